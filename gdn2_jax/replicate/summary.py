"""Chosen learning rates and scores of a budget's cells, from rows."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from gdn2_jax.eval.synthetic.rows import config_of, key_of
from gdn2_jax.eval.synthetic.train import Cell
from gdn2_jax.replicate.plan import Budget
from gdn2_jax.replicate.rates import chosen_rate, curve_of

SOLVED = 0.9  # accuracy above which a run counts as solved


@dataclasses.dataclass(frozen=True)
class CellSummary:
  """Rows of a cell at its chosen learning rate.

  Attributes:
    cell: Mixer and task.
    lr: Chosen learning rate; None while tuning is not complete.
    curve: Mean accuracy on the tuning seeds by learning rate.
    rows: Rows of the reported seeds, in their order.
  """

  cell: Cell
  lr: float | None
  curve: dict[float, float]
  rows: list[dict[str, Any]]

  def scores(self, name: str = "acc") -> np.ndarray:
    """Final accuracy of every seed, of all queries or of a group.

    A run that diverged, with a loss that is not finite, counts as 0.
    """
    metrics = [row["metrics"] for row in self.rows]
    values = [
      m["acc"] if name == "acc" else m["acc_by_group"][name] for m in metrics
    ]
    return np.where(np.isfinite(values), values, 0.0)

  def share(self, kind: str) -> float:
    """Mean share of answers of a kind."""
    return float(np.mean([row["metrics"]["kinds"][kind] for row in self.rows]))

  def mean_of(self, field: str) -> float:
    """Mean of a field of the rows."""
    return float(np.mean([row[field] for row in self.rows]))


def summarize(budget: Budget, rows: list[dict[str, Any]]) -> list[CellSummary]:
  """Summaries of all cells of a budget, in the order of the plan."""
  by_key = {row["key"]: row for row in rows}
  found = []
  for cell in budget.cells():
    lr = chosen_rate(cell, budget, by_key)
    own = []
    if lr is not None:
      keys = [key_of(config_of(cell, s, lr)) for s in budget.report_seeds]
      own = [by_key[key] for key in keys if key in by_key]
    found.append(CellSummary(cell, lr, curve_of(cell, budget, by_key), own))
  return found


def scores_of(
  cells: list[CellSummary],
) -> Mapping[tuple[str, str, str], dict[int, float]]:
  """Scores as claims need them, by task, mixer and group.

  Where a budget has a task in several sizes, claims are about the first.
  """
  scores: dict[tuple[str, str, str], dict[int, float]] = {}
  for c in cells:
    for name in ("acc", *c.cell.task.groups):
      seeds = [row["seed"] for row in c.rows]
      values = map(float, c.scores(name))
      place = (c.cell.task_name, c.cell.mixer, name)
      scores.setdefault(place, dict(zip(seeds, values, strict=True)))
  return scores
