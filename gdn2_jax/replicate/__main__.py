r"""Compares mixers on synthetic tasks, with seeds, rates and stated claims.

  python -m gdn2_jax.replicate --budget=cpu --out=runs/replicate
  python -m gdn2_jax.replicate --budget=cpu --mixers=gdn2,kda
  python -m gdn2_jax.replicate --budget=cpu --shard=1/3     on three machines,
  cat a/runs.jsonl b/runs.jsonl >runs/replicate/runs.jsonl  then
  python -m gdn2_jax.replicate --budget=cpu --report
  python -m gdn2_jax.replicate --budget=gpu15 --rehearse    toy sizes, a CPU

Learning rates are chosen on seeds of their own. Rows in OUT/runs.jsonl are not
run again, so a killed command goes on where it was. At the end OUT has
claims.md, table.md, curves.png and capacity.png, made from the rows alone.
Exit status: 0 done; 1 refused, or a process failed; 3 rows are still missing
(--minutes is over, or other shards have them).
"""

import os
import pathlib
import sys
import time

import tqdm
from absl import flags

from gdn2_jax import cli
from gdn2_jax.eval.synthetic.rows import append_rows, read_rows
from gdn2_jax.replicate.language import language_runs, run_language_model
from gdn2_jax.replicate.plan import BUDGETS, Budget, rehearsal
from gdn2_jax.replicate.report import write_report
from gdn2_jax.replicate.run import run_cell, shard_of
from gdn2_jax.replicate.workers import (
  label_of,
  remaining_runs,
  run_in_processes,
  stop_if_orphaned,
)

_BUDGET = flags.DEFINE_enum(
  "budget",
  None,
  list(BUDGETS),
  "; ".join(f"{name}: {b.purpose}" for name, b in BUDGETS.items()),
)
_OUT = flags.DEFINE_string("out", "runs/replicate", "Folder of the results.")
_MIXERS = flags.DEFINE_list("mixers", [], "Only these mixers of the budget.")
_SHARD = flags.DEFINE_string(
  "shard", "1/1", "i/n: every n-th cell from the i-th on, for n machines."
)
_WORKERS = flags.DEFINE_integer(
  "workers",
  0,
  "Processes at a time, one core each; 0: one per core for budgets of single "
  "runs, else the work is done in this process.",
)
_MINUTES = flags.DEFINE_float(
  "minutes", 0.0, "Start nothing after so many minutes; 0: the budget's."
)
_REPORT = flags.DEFINE_bool("report", False, "Write the report, run nothing.")
_REHEARSE = flags.DEFINE_bool(
  "rehearse",
  False,
  "Toy sizes: every step of the budget, in minutes, on a CPU.",
)
_DATA = flags.DEFINE_string(
  "data", "", "gpuday: folder of packed rows for the language models."
)
_ONLY = flags.DEFINE_string(
  "only", None, "TASK:MIXER: this cell alone, in this process, no report."
)
_PARENT = flags.DEFINE_integer(
  "parent", 0, "Process to end with; 0: none. Set for worker processes."
)


def main(argv: list[str]) -> None:
  """Entry point: checks the command line, runs what is missing, reports."""
  cli.refuse_positional(argv, "--budget=cpu")
  with cli.one_line_errors():
    began = time.monotonic()
    budget, cells = _plan()
    folder = pathlib.Path(_OUT.value)
    path = folder / "runs.jsonl"
    read_rows(path)  # refuses a damaged file before anything is run
    if not (_REPORT.value or _ONLY.value):
      _language(budget)
    minutes = _MINUTES.value or budget.minutes
    deadline = began + 60 * minutes if minutes else None
    if _ONLY.value:
      _run_here(cells, budget, path, deadline)
      return
    failed = [] if _REPORT.value else _run(cells, budget, path, deadline)
    rows = read_rows(path)
    lines = write_report(folder, budget, rows)
    missing = remaining_runs(budget.cells(), budget, rows)
  print("\n".join(lines))
  print(f"\n{folder}: claims.md, table.md, curves.png, capacity.png")
  for line in failed:
    print(f"error: {line}", file=sys.stderr)
  if missing:
    print(f"{missing} runs of the budget are missing", file=sys.stderr)
  sys.exit(1 if failed else 3 if missing and not _REPORT.value else 0)


def _plan() -> tuple[Budget, list]:
  """Budget and cells of the command line, checked."""
  if not _BUDGET.value:
    raise ValueError(f"--budget is missing: expected {', '.join(BUDGETS)}")
  budget = BUDGETS[_BUDGET.value]
  if _REHEARSE.value:
    budget = rehearsal(budget)
  if _MINUTES.value < 0 or _WORKERS.value < 0:
    name = "minutes" if _MINUTES.value < 0 else "workers"
    raise ValueError(f"--{name}: expected >= 0")
  index, _, count = _SHARD.value.partition("/")
  if not (
    index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)
  ):
    raise ValueError(
      f"--shard={_SHARD.value}: expected i/n with 1 <= i <= n, e.g. 1/2"
    )
  cells = budget.cells(tuple(_MIXERS.value))
  if _ONLY.value:
    cells = [c for c in cells if label_of(c) == _ONLY.value]
    if not cells:
      raise ValueError(f"--only={_ONLY.value}: no such cell in the budget")
  return budget, shard_of(cells, int(index), int(count))


def _run(cells, budget, path, deadline):
  """Runs the cells and the language models; returns what failed."""
  append_rows(path, [])  # takes off what a killed command left of a line
  workers = _WORKERS.value
  if not workers:
    cores = len(os.sched_getaffinity(0))
    workers = cores if budget.width == 1 else 1
  if workers == 1:
    failed = []
    _run_here(cells, budget, path, deadline)
  else:
    command = [sys.executable, "-m", "gdn2_jax.replicate"]
    command += [f"--budget={_BUDGET.value}", f"--out={_OUT.value}"]
    command += [f"--parent={os.getpid()}"]
    command += ["--rehearse"] if _REHEARSE.value else []
    with _bar() as bar:

      def progress(done, left):
        bar.total, bar.n = done + left, done
        bar.refresh()

      failed = run_in_processes(
        cells, budget, path, workers, command, progress, deadline
      )
  if _MIXERS.value or not _SHARD.value.startswith("1/"):
    return failed
  for run in _language(budget):
    if deadline is not None and time.monotonic() > deadline:
      break
    print(f"training {run.name}", flush=True)
    if error := run_language_model(run, path):
      failed.append(error)
  return failed


def _language(budget):
  return language_runs(
    budget.language, rehearse=_REHEARSE.value, data=_DATA.value
  )


def _bar(**options):
  return tqdm.tqdm(unit="run", smoothing=0.05, **options)


def _run_here(cells, budget, path, deadline):
  """Runs cells in this process, one after the other."""
  check = stop_if_orphaned(_PARENT.value)
  left = remaining_runs(cells, budget, read_rows(path))
  with _bar(total=left) as bar:

    def progress(text, done):
      check()
      bar.set_description(text, refresh=False)
      bar.update(done)

    for cell in cells:
      if deadline is not None and time.monotonic() > deadline:
        return
      run_cell(cell, budget, path, progress)


if __name__ == "__main__":
  cli.run(main, __doc__)
