"""Runs tasks of lm-eval with a model; one row per task."""

import importlib.metadata
import os
from collections.abc import Sequence
from typing import Any

import gdn2_jax
from gdn2_jax.eval.harness.adapter import as_lm
from gdn2_jax.eval.harness.rows import make_row
from gdn2_jax.eval.rows import RowStore
from gdn2_jax.eval.scoring import BATCH_SIZE
from gdn2_jax.interop.folder import Model

_RESAMPLES = 1000  # for standard errors of perplexities; means have a formula


def versions() -> dict[str, str]:
  """Versions of the packages that decide prompts and scores."""
  names = ("jax", "lm_eval", "datasets")
  found = {name: importlib.metadata.version(name) for name in names}
  return {"gdn2_jax": gdn2_jax.__version__} | found


def run(
  model: Model,
  names: Sequence[str],
  manager: Any,
  store: RowStore,
  *,
  limit: int | None = None,
  shots: int | None = None,
  batch_size: int = BATCH_SIZE,
) -> None:
  """Evaluates the tasks that the store has no row of.

  Args:
    model: with a tokenizer.
    names: names of tasks, groups or tags.
    manager: from `open_tasks`.
    store: gets a row of `make_row` under the name of each.
    limit: examples per task; None uses all.
    shots: examples in the prompts; None leaves it to the task.
    batch_size: rows at a time.
  """
  import lm_eval

  # Or lm-eval forks this process, whose threads a copy does not have.
  os.environ["DISABLE_MULTIPROC"] = "1"
  adapter = as_lm(model, batch_size=batch_size)
  for name in names:
    if name in store:
      continue
    evaluated = lm_eval.simple_evaluate(
      model=adapter,
      tasks=[name],
      task_manager=manager,
      limit=limit,
      num_fewshot=shots,
      bootstrap_iters=_RESAMPLES,
    )
    store.add(name, make_row(evaluated))
