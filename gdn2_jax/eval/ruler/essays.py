"""Prose of haystacks, and its sentences."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable

from gdn2_jax.data.text.corpus import read_corpus
from gdn2_jax.files import sha256_bytes

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclasses.dataclass(frozen=True)
class Essays:
  """Prose as words.

  Attributes:
    label: name in reports.
    words: in order.
    sha256: of the words joined by spaces.
  """

  label: str
  words: tuple[str, ...]
  sha256: str


def read_essays(path: str | None) -> Essays:
  """Reads prose from a file, or the documentation that Python carries.

  Args:
    path: plain text; or a .json file with an object whose "text" is a string
      or a list of strings, as RULER's PaulGrahamEssays.json; None for the
      corpus "embedded" of `gdn2_jax.data`.

  Raises:
    ValueError: not such a file, or one without words.
    OSError: it cannot be read.
  """
  if path is None:
    documents = read_corpus("embedded").documents
    text = " ".join(document.text for document in documents)
    return make_essays("python-docs (not the paper's)", text)
  name = pathlib.Path(path).name
  try:
    text = pathlib.Path(path).read_text(encoding="utf-8")
    if name.endswith(".json"):
      text = _text_of(json.loads(text))
  except ValueError as error:
    raise ValueError(
      f"--essays={path}: expected UTF-8 text, or a .json file with an object "
      f'that has a "text": {error}'
    ) from None
  if not text.strip():
    raise ValueError(f"--essays={path}: holds no words")
  return make_essays(name, text)


def make_essays(label: str, text: str) -> Essays:
  """Prose of a text; its words are what stands between white space."""
  # As RULER does it: white space at the ends leaves an empty word.
  words = re.sub(r"\s+", " ", text).split(" ")
  return Essays(label, tuple(words), sha256_bytes(" ".join(words).encode()))


def _text_of(content) -> str:
  text = content.get("text") if isinstance(content, dict) else None
  if isinstance(text, list) and all(isinstance(part, str) for part in text):
    return " ".join(text)
  if not isinstance(text, str):
    raise ValueError("no such object")
  return text


def sentence_splitter() -> tuple[str, Callable[[str], list[str]]]:
  """Name and function of a splitter: NLTK's punkt if it is installed.

  RULER and lm-eval use punkt, whose data are a download of their own. Without
  it a sentence ends after each ".", "!" or "?" before white space. The splitter
  decides where needles can stand, and nothing else.
  """
  try:
    import nltk

    nltk.data.find("tokenizers/punkt_tab")
  except (ImportError, LookupError):
    return "regex", split_sentences
  return f"punkt (nltk {nltk.__version__})", nltk.tokenize.sent_tokenize


def split_sentences(text: str) -> list[str]:
  """Splits after each ".", "!" and "?" that white space follows."""
  return _SENTENCE_END.split(text)
