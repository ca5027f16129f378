"""Reports from rows alone."""

import dataclasses

import pytest

from gdn2_jax.eval.synthetic.tasks import Recall, SetAdd
from gdn2_jax.replicate.plan import BUDGETS, Experiment
from gdn2_jax.replicate.report import write_report
from tests.replicate.made_up import made_up_row

BUDGET = dataclasses.replace(
  BUDGETS["ci"],
  experiments=(
    Experiment(SetAdd(keys=3, writes=8), ("gdn2", "kda")),
    Experiment(Recall(4), ("gdn2", "kda")),
  ),
  seeds=8,
)
LOW, HIGH = BUDGET.lrs


def rows(shift):
  found = []
  for cell in BUDGET.cells():
    for lr, acc in ((LOW, 0.3), (HIGH, 0.2)):
      found.append(made_up_row(cell, 100, lr, acc, "tune"))
    for seed in BUDGET.report_seeds:
      extra = shift + 0.002 * seed if cell.mixer == "gdn2" else 0
      found.append(made_up_row(cell, seed, LOW, 0.7 + 0.01 * seed + extra))
      # Of another rate: no part of the report.
      found.append(made_up_row(cell, seed, HIGH, 0.0))
  return found


def lines(path, start):
  return [x for x in path.read_text().splitlines() if x.startswith(start)]


@pytest.fixture
def no_figures(monkeypatch):
  for name in ("plot_curves", "plot_capacity"):
    monkeypatch.setattr(f"gdn2_jax.replicate.report.{name}", lambda *_: None)


def test_report_of_made_up_rows(tmp_path):
  says = write_report(tmp_path, BUDGET, rows(0.2))
  assert says[2].startswith("C3 holds: ")
  assert says[0].startswith("C1 not run: ")
  [test] = lines(tmp_path / "claims.md", "| setadd: gdn2 > kda")
  # 0.2 and 0.002 times the mean of seeds 0 to 7.
  assert test.startswith("| setadd: gdn2 > kda | +0.207 [+0.20")
  assert test.endswith("| holds |") and "| 8 |" in test
  [gdn2, _] = [
    x for x in lines(tmp_path / "table.md", "| gdn2 |") if "of 8" in x
  ]
  cells = [x.strip() for x in gdn2.strip("|").split("|")]
  # Mean, sd, median, and the share of seeds above 0.9 (all but the first).
  assert cells[1:6] == ["8 of 8", "0.942", "0.029", "0.942", "0.88"]
  tuning = lines(tmp_path / "table.md", "| gdn2 | **0.300** | 0.200 | yes |")
  assert len(tuning) == 2
  for name in ("curves.png", "capacity.png"):
    assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("shift", "says"), [(-0.2, "fails"), (-0.007, "und")])
def test_a_reversal_and_a_null_are_results(tmp_path, no_figures, shift, says):
  assert f"C3 {says}" in write_report(tmp_path, BUDGET, rows(shift))[2]


def test_a_report_of_some_rows_says_what_is_missing(tmp_path, no_figures):
  cell = BUDGET.cells()[0]
  language = {
    "suite": "language",
    "config": "c.py",
    "mixer": "kda",
    "seed": 0,
    "metrics": {"model": {"1x": {"nats_per_token": 3.0, "bits_per_byte": 1.5}}},
    "key": "0",
  }
  tuned = made_up_row(cell, 100, LOW, 0.3, "tune")
  write_report(tmp_path, BUDGET, [tuned, language])
  assert lines(tmp_path / "table.md", "| c.py | kda | 0 | 3.0000 | 1.5000 |")
  assert lines(tmp_path / "table.md", "| kda | 0 of 8 |")


def test_rows_of_another_plan_are_no_report(tmp_path):
  other = dataclasses.replace(
    BUDGET, training=dataclasses.replace(BUDGET.training, steps=40)
  )
  with pytest.raises(ValueError, match="none of 72 rows belongs"):
    write_report(tmp_path, other, rows(0.0))
