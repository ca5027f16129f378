"""Cells in processes of their own, several at a time.

XLA uses the threads of a CPU badly for models of this size, so each process
gets one core, and the cells are handed out as processes end.
"""

import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from gdn2_jax.eval.synthetic.rows import read_rows
from gdn2_jax.eval.synthetic.train import Cell
from gdn2_jax.replicate.plan import Budget
from gdn2_jax.replicate.rates import next_runs

_POLL_SECONDS = 2.0


def label_of(cell: Cell) -> str:
  """Name of a cell on the command line."""
  return f"{cell.task_name}:{cell.mixer}"


def remaining_runs(
  cells: Sequence[Cell], budget: Budget, rows: Sequence[dict[str, Any]]
) -> int:
  """Runs that cells still need, if no more learning rates are added."""
  by_key = {row["key"]: row for row in rows}
  total = 0
  for cell in cells:
    role, runs = next_runs(cell, budget, by_key)
    total += len(runs) + (budget.seeds if role == "tune" else 0)
  return total


def run_in_processes(
  cells: Sequence[Cell],
  budget: Budget,
  path: pathlib.Path,
  workers: int,
  command: list[str],
  progress: Callable[[int, int], None],
  deadline: float | None = None,
) -> list[str]:
  """Runs every cell with `command --only=CELL`, `workers` at a time.

  Args:
    cells: Cells to run.
    budget: Their budget.
    path: JSONL file that the processes append to.
    workers: Processes at a time, each on a core of its own if there are enough.
    command: Command line of this program for one cell, without --only.
    progress: Called with the runs done and the runs that remain.
    deadline: time.monotonic() from which no process is started; None: never.

  Returns:
    A line for each process that failed.
  """
  waiting = list(
    dict.fromkeys(label_of(c) for c in cells if _is_open(c, budget, path))
  )
  cores = sorted(os.sched_getaffinity(0))
  free = list(range(workers))
  running: dict[subprocess.Popen, tuple[str, int, pathlib.Path]] = {}
  failed = []
  at_first = remaining_runs(cells, budget, read_rows(path))
  try:
    while waiting or running:
      while waiting and free and not _is_over(deadline):
        label, slot = waiting.pop(0), free.pop(0)
        log = path.parent / "log" / f"{label.replace(':', '-')}.txt"
        own = {cores[slot % len(cores)]}
        running[_start([*command, f"--only={label}"], log, own)] = (
          label,
          slot,
          log,
        )
      if not running:
        break
      time.sleep(_POLL_SECONDS if budget.training.steps > 100 else 0.1)
      for process in [p for p in running if p.poll() is not None]:
        label, slot, log = running.pop(process)
        free.append(slot)
        if process.returncode:
          failed.append(f"{label}: exit code {process.returncode}, see {log}")
      left = remaining_runs(cells, budget, read_rows(path))
      progress(max(0, at_first - left), left)
  finally:
    for process in running:
      process.terminate()
    for process in running:
      process.wait()
  return failed


def _is_open(cell: Cell, budget: Budget, path: pathlib.Path) -> bool:
  return remaining_runs([cell], budget, read_rows(path)) > 0


def _is_over(deadline: float | None) -> bool:
  return deadline is not None and time.monotonic() > deadline


def _start(command, log, cores):
  log.parent.mkdir(parents=True, exist_ok=True)
  with open(log, "wb") as file:
    process = subprocess.Popen(
      command, stdin=subprocess.DEVNULL, stdout=file, stderr=file
    )
  # Before the process has imported JAX, which asks for the cores once.
  os.sched_setaffinity(process.pid, cores)
  return process


class Orphaned(SystemExit):
  """The process that started this one is gone."""


def stop_if_orphaned(parent: int) -> Callable[[], None]:
  """A check that ends this process when its parent has been killed."""

  def check() -> None:
    if parent and os.getppid() != parent:
      print("the parent process is gone", file=sys.stderr)
      raise Orphaned(1)

  return check
