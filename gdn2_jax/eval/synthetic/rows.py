"""Rows of results: one JSON object per run, in files that only grow.

A row's key is the SHA-256 of its config, which determines the run. Several
processes may append to a file, a killed one leaves at most half a line, and
files of several machines are merged by concatenation.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from gdn2_jax.eval.rows import end_of_lines
from gdn2_jax.eval.synthetic.mixers import choice_of
from gdn2_jax.eval.synthetic.train import Cell, Outcome

SUITE = "synthetic"
VERSION = 1  # raised when the same config gives other results

Row = dict[str, Any]


def config_of(cell: Cell, seed: int, lr: float) -> Row:
  """Everything that determines the result of a run."""
  return {
    "suite": SUITE,
    "version": VERSION,
    "task": cell.task_name,
    "task_args": dataclasses.asdict(cell.task),
    "format": cell.format,
    "mixer": cell.mixer,
    "seed": int(seed),
    "lr": float(lr),
    "sizes": dataclasses.asdict(cell.sizes),
    "training": dataclasses.asdict(cell.training),
  }


def key_of(config: Row) -> str:
  """SHA-256 of a config."""
  text = json.dumps(config, sort_keys=True, separators=(",", ":"))
  return hashlib.sha256(text.encode()).hexdigest()


def row_of(cell: Cell, outcome: Outcome, role: str, facts: Row) -> Row:
  """A row of the results file.

  Args:
    cell: Of the run.
    outcome: Its results.
    role: "tune", for the choice of a learning rate, or "report".
    facts: What is the same for all runs of a program: params, state_bytes,
      latency, device, versions.
  """
  config = config_of(cell, outcome.seed, outcome.lr)
  training = cell.training
  return {
    **config,
    "ablation": choice_of(cell.mixer).ablation,
    "role": role,
    "tokens": training.steps * training.batch_size * facts["length"],
    "metrics": outcome.metrics,
    "curve": outcome.curve,
    "cpu_s": outcome.cpu_s,
    "wall_s": outcome.wall_s,
    "compile_s": outcome.compile_s,
    **facts,
    "key": key_of(config),
    "status": "done",
  }


def append_rows(path: str | os.PathLike[str], rows: Sequence[Row]) -> None:
  """Appends rows to a file, all in one write, and flushes it to the device.

  Half a line that a killed process left at the end is removed first. Rows whose
  key is there, as two processes may have run the same, are left out.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with _locked(path) as file:
    # In append mode every write goes to the end, wherever it then is.
    file.truncate(end_of_lines(file))
    known = {row["key"] for row in read_rows(path)}
    new = [row for row in rows if row["key"] not in known]
    file.write(b"".join(json.dumps(row).encode() + b"\n" for row in new))
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[Any]:
  """The file, open for reading and writing by one process at a time."""
  with open(path, "a+b") as file:
    # Released by the system if the process is killed.
    fcntl.flock(file, fcntl.LOCK_EX)
    yield file


def read_rows(*paths: str | os.PathLike[str]) -> list[Row]:
  """Rows of files that exist, each key once, the first that was written.

  Raises:
    ValueError: A line is not a row, other than half a line at the end.
  """
  rows: dict[str, Row] = {}
  for path in map(pathlib.Path, paths):
    if not path.exists():
      continue
    text = path.read_bytes()
    lines = text.split(b"\n")[:-1]
    for number, line in enumerate(lines, start=1):
      try:
        row = json.loads(line)
        rows.setdefault(row["key"], row)
      except (ValueError, TypeError, KeyError):
        raise ValueError(
          f"{path}: line {number} is {line[:40]!r}, expected a row of results"
        ) from None
  return list(rows.values())
