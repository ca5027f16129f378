"""Being asked to stop: SIGTERM, and twice."""

import random
import re
import signal
import time
from collections.abc import Callable

from tests.faults.child import train_rows
from tests.faults.lab import Lab, newest
from tests.faults.outcome import Outcome, tries


def sigterm(lab: Lab, count: int, tick: Callable[[], object]) -> Outcome:
  """Exit 0 with the current step saved; the next start goes on from it (F3)."""
  outcome = Outcome("SIGTERM, one process")
  chance = random.Random(1)
  workdir, saved = lab.workdir("sigterm"), 0
  sparse = "--config.checkpoint.every_steps=0"
  for one in tries(outcome, count, tick):
    if saved > lab.num_steps // 2:
      workdir, saved = lab.workdir("sigterm"), 0
    child = lab.start(workdir, sparse)
    child.wait_for_step(saved + 1)
    one.lost(max(saved - child.resumed_from, 0))
    time.sleep(chance.uniform(0.0, 0.3))
    done, start = max(train_rows(workdir), default=0), time.monotonic()
    child.send(signal.SIGTERM)
    code = child.end()
    outcome.largest("longest exit, s", time.monotonic() - start)
    found = re.search(r"SIGTERM: saved step (\d+), stopping", child.output)
    one.expect(code == 0 and found is not None, child.output[-500:])
    saved = int(found[1]) if found else newest(workdir)
    one.expect(done <= saved == newest(workdir), f"saved {saved}, done {done}")
    one.silent(lab.wrong_steps(workdir))
  return outcome


def second_signal(lab: Lab, count: int, tick: Callable[[], object]) -> Outcome:
  """A second signal while the save of the first one is written (F5)."""
  outcome = Outcome("second signal during the save")
  for number, one in enumerate(tries(outcome, count, tick)):
    kind = (signal.SIGTERM, signal.SIGINT)[number % 2]
    workdir = lab.workdir("second", [10])
    child = lab.start(
      workdir, "--config.checkpoint.every_steps=0", faults=["slow_save=3"]
    )
    child.wait_for_step(11)
    child.send(kind)
    child.wait_for_text("saving ")
    start = time.monotonic()
    child.send(kind)
    code = child.end(30.0)
    outcome.largest("longest exit, s", time.monotonic() - start)
    one.expect(code != 0, f"{kind.name}: exit code {code}")
    committed = newest(workdir)
    child = lab.start(workdir, "--config.checkpoint.every_steps=0")
    child.wait_for_step(committed + 1)
    one.lost(max(committed - child.resumed_from, 0))
    one.expect(committed >= 10, "the step before is gone")
    child.send(signal.SIGTERM)
    one.expect(child.end() == 0, child.output[-500:])
    tmp = list((workdir / "checkpoints").glob("*tmp*"))
    one.expect(not tmp, f"left behind: {tmp}")
    one.silent(lab.wrong_steps(workdir))
  return outcome
