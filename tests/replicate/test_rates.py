"""Choice of a learning rate from rows."""

import dataclasses
import math

import pytest

from gdn2_jax.replicate.plan import BUDGETS
from gdn2_jax.replicate.rates import (
  best_of,
  chosen_rate,
  is_at_edge,
  next_runs,
)
from tests.replicate.made_up import made_up_row

BUDGET = dataclasses.replace(
  BUDGETS["ci"], lrs=(1e-3, 2e-3, 4e-3), extensions=2, tuning_seeds=2, seeds=3
)
CELL = BUDGET.cells()[0]


def tuned(scores):
  """Rows of the tuning seeds, by key; `scores` by rate."""
  rows = [
    made_up_row(CELL, seed, lr, acc, "tune")
    for lr, acc in scores.items()
    for seed in BUDGET.tuning
  ]
  return {row["key"]: row for row in rows}


def test_first_come_all_rates_on_seeds_of_their_own():
  role, runs = next_runs(CELL, BUDGET, {})
  assert role == "tune"
  assert runs == [(s, lr) for lr in BUDGET.lrs for s in (100, 101)]
  assert not set(BUDGET.tuning) & set(BUDGET.report_seeds)


def test_a_killed_tuning_goes_on_with_what_is_missing():
  rows = tuned({1e-3: 0.5, 2e-3: 0.6})
  dropped = list(rows)[-1]
  del rows[dropped]
  role, runs = next_runs(CELL, BUDGET, rows)
  assert (role, runs) == ("tune", [(101, 2e-3), (100, 4e-3), (101, 4e-3)])
  assert chosen_rate(CELL, BUDGET, rows) is None


def test_the_best_in_the_middle_is_reported():
  rows = tuned({1e-3: 0.5, 2e-3: 0.6, 4e-3: 0.55})
  assert next_runs(CELL, BUDGET, rows) == (
    "report",
    [(0, 2e-3), (1, 2e-3), (2, 2e-3)],
  )
  done = made_up_row(CELL, 1, 2e-3, 0.1)
  rows[done["key"]] = done
  assert next_runs(CELL, BUDGET, rows)[1] == [(0, 2e-3), (2, 2e-3)]


@pytest.mark.parametrize(
  ("scores", "more"),
  [
    ({1e-3: 0.5, 2e-3: 0.6, 4e-3: 0.7}, 8e-3),
    ({1e-3: 0.7, 2e-3: 0.6, 4e-3: 0.5}, 5e-4),
    ({1e-3: 0.5, 2e-3: 0.6, 4e-3: 0.7, 8e-3: 0.8}, 16e-3),
  ],
)
def test_a_best_rate_at_an_edge_extends_the_grid(scores, more):
  role, runs = next_runs(CELL, BUDGET, tuned(scores))
  assert (role, runs) == ("tune", [(100, more), (101, more)])


def test_extensions_end():
  scores = {1e-3: 0.5, 2e-3: 0.6, 4e-3: 0.7, 8e-3: 0.8, 16e-3: 0.9}
  role, runs = next_runs(CELL, BUDGET, tuned(scores))
  assert role == "report" and runs[0] == (0, 16e-3)
  assert is_at_edge(scores, 16e-3) and not is_at_edge(scores, 8e-3)


def test_of_equals_the_larger_rate_is_chosen():
  assert best_of({1e-3: 0.7, 2e-3: 0.7, 4e-3: 0.6}) == 2e-3


def test_a_run_that_diverged_counts_as_zero():
  rows = tuned({1e-3: 0.5, 2e-3: 0.6, 4e-3: math.nan})
  assert chosen_rate(CELL, BUDGET, rows) == 2e-3


def test_nothing_is_left_when_all_is_done():
  rows = tuned({1e-3: 0.5, 2e-3: 0.6, 4e-3: 0.55})
  for seed in BUDGET.report_seeds:
    row = made_up_row(CELL, seed, 2e-3, 0.5)
    rows[row["key"]] = row
  assert next_runs(CELL, BUDGET, rows) == ("report", [])
