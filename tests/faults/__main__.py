r"""Injects faults into real training runs: kills, damage, full disks, hangs.

  python -m tests.faults                    the long version: `make faults`
  python -m tests.faults --scale=0.1        a tenth of the tries
  python -m tests.faults --only=flip,stuck  these faults

Prints a table and, after every fault, updates its entry in the JSON file. Exit
code 0 if every try survived, no committed step was lost and no run went on with
wrong numbers.
"""

import datetime
import json
import os
import pathlib
import platform
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable

from absl import flags
from tqdm import tqdm

from gdn2_jax import cli
from gdn2_jax.train.report.writer import versions, write_json
from tests.faults import cluster, damage, signals, stops
from tests.faults.lab import Lab
from tests.faults.outcome import Outcome, format_table

Fault = Callable[[Lab, int, Callable[[], object]], Outcome]

# Name: function, and tries at --scale=1.
FAULTS: dict[str, tuple[Fault, int]] = {
  "kill": (signals.kill_loop, 50),
  "kill_in_retention": (signals.kill_in_retention, 15),
  "sigterm": (signals.sigterm, 5),
  "second_signal": (signals.second_signal, 4),
  "flip": (damage.bit_flips, 100),
  "cut": (damage.cut_files, 60),
  "broken_steps": (damage.broken_steps, 1),
  "disk_full": (damage.disk_full, 3),
  "failed_last_save": (damage.failed_last_save, 2),
  "nan": (stops.not_a_number, 2),
  "stuck": (stops.stuck, 3),
  "in_use": (stops.in_use, 1),
  "meshes": (cluster.other_meshes, 4),
}

# Two processes have a truth of their own: sums over devices round otherwise.
PAIR_FAULTS: dict[str, tuple[Fault, int]] = {
  "kill_one_of_two": (cluster.kill_one, 10),
  "sigterm_one_of_two": (cluster.sigterm_one, 4),
  "stuck_one_of_two": (cluster.stuck_one, 2),
}

_SCALE = flags.DEFINE_float(
  "scale", 1.0, "Factor on the number of tries; every fault has at least one."
)
_ONLY = flags.DEFINE_list("only", [], "Names of faults to run; default: all.")
_JSON = flags.DEFINE_string("json", None, "JSON file to add the results to.")
_FOLDER = flags.DEFINE_string(
  "folder", None, "Folder for the runs, kept; default: a temporary one."
)
_STEPS = flags.DEFINE_integer("steps", 400, "Training steps of a run.")


def _chosen(faults: dict[str, tuple[Fault, int]]) -> dict:
  """Those asked for, with the number of tries."""
  return {
    name: (run, max(round(_SCALE.value * count), 1))
    for name, (run, count) in faults.items()
    if not _ONLY.value or name in _ONLY.value
  }


def _run_all(folder: pathlib.Path) -> list[Outcome]:
  alone, pairs = _chosen(FAULTS), _chosen(PAIR_FAULTS)
  unknown = set(_ONLY.value) - set(FAULTS) - set(PAIR_FAULTS)
  if unknown:
    names = ", ".join([*FAULTS, *PAIR_FAULTS])
    cli.fail(f"--only={sorted(unknown)[0]}: the faults are {names}")
  outcomes = []
  total = sum(count for _, count in [*alone.values(), *pairs.values()])
  with tqdm(total=total, unit="try", dynamic_ncols=True) as bar:
    for name, planned, steps in (
      ("one", alone, _STEPS.value),
      ("two", pairs, min(_STEPS.value, 120)),
    ):
      if not planned:
        continue
      bar.set_description("uninterrupted run")
      lab = Lab(folder / name, steps)
      lab.prepare() if name == "one" else cluster.prepare(lab)
      for fault, (run, count) in planned.items():
        bar.set_description(fault)
        outcomes.append(run(lab, count, bar.update))
        _record(fault, outcomes[-1])
        bar.write(format_table(outcomes[-1:]).split("\n", 2)[2])
  return outcomes


def _record(name: str, outcome: Outcome) -> None:
  """Adds a result to the file, in the order of the plan."""
  if not _JSON.value:
    return
  path = pathlib.Path(_JSON.value)
  found = json.loads(path.read_text())["faults"] if path.exists() else {}
  found[name] = outcome.to_json() | {
    "date": datetime.date.today().isoformat(),
    "scale": _SCALE.value,
    "machine": f"{os.cpu_count()} CPUs, {platform.machine()}",
    "versions": versions(),
  }
  order = [name for name in [*FAULTS, *PAIR_FAULTS] if name in found]
  path.parent.mkdir(parents=True, exist_ok=True)
  write_json(path, {"faults": {name: found[name] for name in order}})


def main(argv: list[str]) -> None:
  """Entry point: all faults, one after the other."""
  cli.refuse_positional(argv, "--scale=0.1")
  if _SCALE.value <= 0 or _STEPS.value < 60:
    cli.fail("--scale must be positive, --steps 60 or more")
  # Started in the background of a shell it would be ignored, here and in all
  # runs.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  kept = _FOLDER.value is not None
  folder = pathlib.Path(_FOLDER.value or tempfile.mkdtemp(prefix="faults-"))
  outcomes = _run_all(folder)
  print(format_table(outcomes))
  if not kept:
    shutil.rmtree(folder, ignore_errors=True)
  if not all(outcome.passed for outcome in outcomes):
    sys.exit(1)


if __name__ == "__main__":
  cli.run(main, __doc__ or "")
