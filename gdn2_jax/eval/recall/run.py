"""Runs the recall tasks with a model; one row per example."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from gdn2_jax.eval.recall.tasks import (
  LENGTH,
  MAX_NEW_TOKENS,
  RESERVE,
  STOP,
  TASKS,
  Example,
  contains,
  read_examples,
)
from gdn2_jax.eval.recall.window import make_prompt
from gdn2_jax.eval.rows import RowStore
from gdn2_jax.eval.scoring import greedy
from gdn2_jax.files import sha256_file
from gdn2_jax.interop.folder import Model


def make_settings(
  folder: pathlib.Path,
  names: Sequence[str],
  limit: int | None,
  length: int,
) -> tuple[dict[str, Any], list[Example]]:
  """Reads the examples; returns what decides the rows, and the examples."""
  examples, counts, skipped, hashes = [], {}, {}, {}
  for name in names:
    found, skipped[name] = read_examples(folder, name, limit)
    counts[name] = len(found)
    hashes[name] = sha256_file(folder / TASKS[name].file)
    examples += found
  settings = {
    "evaluation": "recall",
    "limit": limit,
    "length": length,
    "reserve": RESERVE,
    "max_new_tokens": MAX_NEW_TOKENS,
    "examples": counts,
    "skipped": skipped,
    "data": hashes,
  }
  return settings, examples


def run(
  model: Model,
  examples: Sequence[Example],
  store: RowStore,
  *,
  length: int = LENGTH,
  batch_size: int,
  on_done: Callable[[int], Any] = lambda n: None,
) -> None:
  """Answers the examples that the store has no row of.

  Args:
    model: with a tokenizer.
    examples: of any tasks.
    store: gets, for each, the fields "task", "index", "text" (what the model
      wrote), "contains" (an answer is in it), "prompt_tokens" and "has_answer"
      (an answer is in the prompt's part of the context).
    length: tokens of a context and its answer, > RESERVE.
    batch_size: prompts at a time.
    on_done: called with the number of examples that have just got a row.
  """
  pending = []
  for example in examples:
    if _key(example) not in store:
      prompt = make_prompt(example, model.tokenizer, length - RESERVE)
      pending.append((example, prompt))
  # Prompts of a batch are about as long as each other.
  pending.sort(key=lambda pair: -len(pair[1].tokens))
  for start in range(0, len(pending), batch_size):
    some = pending[start : start + batch_size]
    texts = greedy(
      model,
      [prompt.tokens for _, prompt in some],
      MAX_NEW_TOKENS,
      stop_strings=(STOP,),
      batch_size=batch_size,
    )
    for (example, prompt), text in zip(some, texts, strict=True):
      row = {
        "task": example.task,
        "index": example.index,
        "contains": contains(text, example.answers),
        "has_answer": prompt.has_answer,
        "prompt_tokens": len(prompt.tokens),
        "text": text,
      }
      store.add(_key(example), row)
    on_done(len(some))


def _key(example: Example) -> str:
  return f"{example.task}/{example.index}"
