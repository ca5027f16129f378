"""Runs the cells of a budget and appends their rows."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from gdn2_jax.eval.synthetic.latency import decoding_cost
from gdn2_jax.eval.synthetic.rows import append_rows, read_rows, row_of
from gdn2_jax.eval.synthetic.train import Cell, Program
from gdn2_jax.replicate.plan import Budget
from gdn2_jax.replicate.rates import next_runs
from gdn2_jax.train.report.writer import versions

Progress = Callable[[str, float], None]


def shard_of(cells: Sequence[Cell], index: int, count: int) -> list[Cell]:
  """Every count-th cell, for machine `index` of 1 to count."""
  return list(cells[index - 1 :: count])


def run_cell(
  cell: Cell, budget: Budget, path: pathlib.Path, progress: Progress
) -> None:
  """Runs what the file lacks of a cell: first its learning rate, then seeds.

  One program is compiled and used for all runs; each batch of runs is appended
  when it ends, and a killed one starts again.

  Args:
    cell: Mixer and task.
    budget: Rates and seeds.
    path: JSONL file of rows.
    progress: Called with a text and the runs that were done since the last
      call, in parts.
  """
  program, facts = None, {}
  while True:
    rows = {row["key"]: row for row in read_rows(path)}
    role, runs = next_runs(cell, budget, rows)
    if not runs:
      return
    if program is None:
      progress(f"{cell.task_name} {cell.mixer}: compiling", 0)
      program = Program(cell, budget.width or len(budget.report_seeds))
      facts = _facts(program)
    batch = runs[: program.width]
    seeds, lrs = zip(*batch, strict=True)
    part = len(batch) / cell.training.points

    def on_point(step, losses, acc, role=role, part=part):
      text = f"{cell.task_name} {cell.mixer} {role} {step}: {acc.mean():.3f}"
      progress(text, part)

    outcomes = program.run(seeds, lrs, on_point)
    append_rows(path, [row_of(cell, o, role, facts) for o in outcomes])


def _facts(program: Program) -> dict[str, Any]:
  found = versions()
  return {
    "params": program.params,
    "mlp_dim": program.model.mlp_dim,
    **decoding_cost(program),
    "device": found["device"],
    "jax": found["jax"],
    "git": found.get("git"),
  }
