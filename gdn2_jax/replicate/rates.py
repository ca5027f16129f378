"""Choice of a learning rate on tuning seeds, one decision at a time.

Both functions look at rows alone: a run that was killed continues as if it had
not been.
"""

import statistics
from collections.abc import Sequence
from typing import Any

from gdn2_jax.eval.synthetic.rows import config_of, key_of
from gdn2_jax.eval.synthetic.train import Cell
from gdn2_jax.replicate.plan import Budget

Run = tuple[int, float]  # seed, learning rate


def curve_of(
  cell: Cell, budget: Budget, rows: dict[str, Any]
) -> dict[float, float]:
  """Mean final accuracy on the tuning seeds, by learning rate.

  Rates whose runs are not complete are left out. A run that diverged counts
  as accuracy 0.
  """
  curve = {}
  for lr in _reachable(budget):
    found = [
      rows.get(key_of(config_of(cell, seed, lr))) for seed in budget.tuning
    ]
    if all(found):
      scores = [row["metrics"]["acc"] for row in found]
      curve[lr] = statistics.fmean(s if s == s else 0.0 for s in scores)
  return curve


def best_of(curve: dict[float, float]) -> float:
  """The rate with the best accuracy; of equals, the larger."""
  return max(curve, key=lambda lr: (curve[lr], lr))


def next_runs(
  cell: Cell, budget: Budget, rows: dict[str, Any]
) -> tuple[str, list[Run]]:
  """What a cell needs next.

  Args:
    cell: Mixer and task.
    budget: Rates and seeds.
    rows: All rows by key.

  Returns:
    A role and its runs: those of the first rates, then those of one rate more
    while the best is at an edge, then "report" at the best; none when done.
  """
  curve = curve_of(cell, budget, rows)
  wanted = _wanted(budget, curve)
  missing = [lr for lr in wanted if lr not in curve]
  if missing:
    runs = [(seed, lr) for lr in missing for seed in budget.tuning]
    return "tune", _missing(cell, runs, rows)
  best = best_of({lr: curve[lr] for lr in wanted})
  runs = [(seed, best) for seed in budget.report_seeds]
  return "report", _missing(cell, runs, rows)


def chosen_rate(
  cell: Cell, budget: Budget, rows: dict[str, Any]
) -> float | None:
  """The chosen rate of a cell; None while it is not known."""
  curve = curve_of(cell, budget, rows)
  wanted = _wanted(budget, curve)
  if any(lr not in curve for lr in wanted):
    return None
  return best_of({lr: curve[lr] for lr in wanted})


def is_at_edge(curve: dict[float, float], best: float) -> bool:
  """True if a rate beyond those tried might be better still."""
  return len(curve) > 1 and best in (min(curve), max(curve))


def _wanted(budget: Budget, curve: dict[float, float]) -> list[float]:
  """The first rates, and those that the curve so far calls for."""
  wanted = list(budget.lrs)
  for _ in range(budget.extensions):
    if any(lr not in curve for lr in wanted):
      break
    best = best_of({lr: curve[lr] for lr in wanted})
    if best == wanted[-1]:
      wanted.append(2 * best)
    elif best == wanted[0]:
      wanted.insert(0, best / 2)
    else:
      break
  return wanted


def _reachable(budget: Budget) -> Sequence[float]:
  """All rates that extensions may add, exact as they are made."""
  up, down = [budget.lrs[-1]], [budget.lrs[0]]
  for _ in range(budget.extensions):
    up.append(2 * up[-1])
    down.append(down[-1] / 2)
  return sorted({*budget.lrs, *up, *down})


def _missing(cell: Cell, runs: list[Run], rows: dict[str, Any]) -> list[Run]:
  return [run for run in runs if key_of(config_of(cell, *run)) not in rows]
