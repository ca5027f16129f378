"""Numbers that are not finite, processes that hang, directories in use."""

import re
import signal
import time
from collections.abc import Callable

import jax
import numpy as np

from gdn2_jax.train.checkpoint import load_run
from gdn2_jax.train.processes import RETRY
from tests.faults.child import train_rows
from tests.faults.lab import Lab, newest
from tests.faults.outcome import Outcome, tries

_WATCHDOG = 4.0


def not_a_number(lab: Lab, count: int, tick: Callable[[], object]) -> Outcome:
  """A NaN is skipped without a trace; two in a row end the run (F17)."""
  outcome = Outcome("NaN in the loss")
  for one in tries(outcome, count, tick):
    workdir = lab.workdir("nan", [10])
    child = lab.start(workdir, faults=["nan=11", "nan=14", "nan=15"])
    code, output = child.end(), child.output
    one.expect(code == 1, f"exit code {code}: {output[-500:]}")
    one.expect("steps 15 to 16: 2 batches in a row" in output, output[-500:])
    rows = train_rows(workdir)
    one.expect(rows.get(12, (0.0,))[0] is None, f"step 12: {rows.get(12)}")
    # Up to the first NaN nothing is different, afterwards all is finite.
    one.silent([s for s in (11,) if rows.get(s) != lab.truth[s]])
    params = jax.tree.leaves(load_run(workdir).params)
    finite = all(np.isfinite(np.asarray(x)).all() for x in params)
    one.silent([] if finite else [newest(workdir)])
  return outcome


def stuck(
  lab: Lab, count: int, tick: Callable[[], object], late: float = 1.0
) -> Outcome:
  """Alive but not moving: stacks, exit 75 at most `late` s late (F22)."""
  outcome = Outcome("stuck process")
  outcome.notes["watchdog, s"] = _WATCHDOG
  for one in tries(outcome, count, tick):
    workdir = lab.workdir("stuck", [10])
    child = lab.start(
      workdir,
      f"--config.watchdog_seconds={_WATCHDOG}",
      faults=["stuck=15"],
    )
    code, end = child.end(), time.time()
    found = re.search(r"stuck at ([\d.]+)", child.output)
    one.expect(code == RETRY, f"exit code {code}: {child.output[-500:]}")
    one.expect("in _hang" in child.output, "the stack is not shown")
    if one.expect(found is not None, "was never stuck"):
      seconds = end - float(found[1])
      outcome.largest("longest stall, s", seconds)
      one.expect(seconds <= _WATCHDOG + late, f"ended after {seconds:.2f} s")
    one.lost(max(14 - newest(workdir), 0))
    one.silent(lab.wrong_steps(workdir))
  return outcome


def in_use(lab: Lab, count: int, tick: Callable[[], object]) -> Outcome:
  """A second run on the same workdir is refused and harms nothing (F27)."""
  outcome = Outcome("two runs, one workdir")
  workdir = lab.workdir("shared")
  holder = lab.start(workdir, "--config.checkpoint.every_steps=100")
  holder.wait_for_step(1)
  holder.send(signal.SIGSTOP)
  for one in tries(outcome, count, tick):
    child = lab.start(workdir)
    code = child.end()
    one.expect(code == 1, f"exit code {code}: {child.output[-500:]}")
    who = f"process {holder.process.pid} on host"
    one.expect(who in child.output, child.output[-500:])
  holder.send(signal.SIGCONT)
  holder.send(signal.SIGTERM)
  if holder.end() != 0 or lab.wrong_steps(workdir):
    outcome.problems.append("the first run was disturbed")
    outcome.survived -= 1
  return outcome
