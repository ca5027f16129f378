"""A word tokenizer and the prose of the golden prompts."""

import functools
import re

from gdn2_jax.data.text.corpus import read_corpus
from gdn2_jax.eval.ruler.essays import Essays, make_essays, split_sentences
from gdn2_jax.eval.ruler.tasks import Haystacks
from gdn2_jax.eval.ruler.words import Keys, short_keys

TOKEN = re.compile(r"\w+|[^\w\s]")  # a word or a punctuation mark


def count_tokens(text: str) -> int:
  return len(TOKEN.findall(text))


@functools.cache
def snapshot() -> Essays:
  """The frozen excerpt of Python's documentation, one text."""
  documents = read_corpus("snapshot").documents
  return make_essays("snapshot", " ".join(d.text for d in documents))


def haystacks(generator: str, keys: Keys | None = None) -> Haystacks:
  """What the golden prompts were made of, but for the keys."""
  return Haystacks(
    keys or short_keys(),
    snapshot().words,
    split_sentences,
    repeats=generator == "ruler",
  )
