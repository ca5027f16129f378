"""Needle tests short enough for small models, from words of any text."""

import random
import re
from collections.abc import Sequence
from typing import Any

from gdn2_jax.eval.ruler.evaluate import score_samples
from gdn2_jax.eval.ruler.tasks import TASKS, Haystacks
from gdn2_jax.interop.folder import Model

_WORD = re.compile(r"[a-z]{4,10}")
_SENTENCE = re.compile(r"(?<=[.!?])\s+")


def haystacks_of(texts: Sequence[str]) -> Haystacks:
  """Haystacks whose prose and keys are words of these texts.

  RULER draws its keys from a word list of its own and its prose from essays:
  results with other words are no results of RULER.

  Raises:
    ValueError: texts without words of 4 to 10 letters.
  """
  words = [word for text in texts for word in text.split()]
  keys = sorted({w for text in texts for w in _WORD.findall(text)})
  if not keys:
    raise ValueError("texts: no words, expected words of 4 to 10 letters")
  return Haystacks(keys, words, _SENTENCE.split, repeats=True)


def needle_test(
  model: Model,
  haystacks: Haystacks,
  sizes: Sequence[int],
  *,
  task: str = "niah_single_1",
  count: int = 8,
  seed: int = 42,
) -> list[dict[str, Any]]:
  """Scores of samples with haystacks of given sizes, teacher-forced.

  `gdn2_jax.eval ruler` sizes haystacks by a length in tokens as RULER does, of
  which the shortest is too long for a small model.

  Args:
    model: With a tokenizer.
    haystacks: Source of samples.
    sizes: Lines of a haystack, for tasks of prose words; ascending.
    task: One of `ruler.tasks.TASKS`.
    count: Samples of each size.
    seed: Of the samples.

  Returns:
    Rows with "size", "depth", "prompt_tokens", "forced", "value_logprob",
    "value_tokens" and "gain" (see `ruler.evaluate`).

  Raises:
    ValueError: an unknown task, a size below 1, or a model without a tokenizer.
  """
  if task not in TASKS:
    raise ValueError(f"task={task!r}: expected one of {', '.join(TASKS)}")
  if model.tokenizer is None:
    raise ValueError("model: no tokenizer, expected one that encodes prompts")
  for size in sizes:
    if size < 1:
      raise ValueError(f"sizes: got {size}, expected at least 1")
  rng, rows = random.Random(seed), []
  for size in sizes:
    batch = [haystacks.draw(TASKS[task], size, rng) for _ in range(count)]
    found = score_samples(model, batch, ("forced", "gain"), count)
    rows += [
      {"size": size, "depth": sample.depth} | scores
      for sample, scores in zip(batch, found, strict=True)
    ]
  return rows
