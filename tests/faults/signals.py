"""Processes that are killed, and processes that are asked to stop."""

import random
import re
import signal
import time
from collections.abc import Callable, Sequence

from gdn2_jax.train.checkpoint.meta import committed_steps
from tests.faults.child import train_rows
from tests.faults.lab import GRID, Lab, newest
from tests.faults.outcome import Outcome, tries

_RETENTION = (
  "die_at_commit",
  "die_after_commit",
  "die_at_retention",
  "die_after_retention",
  "die_in_trash",
)


def kill_loop(lab: Lab, count: int, tick: Callable[[], object]) -> Outcome:
  """kill -9 within 0.6 s of one of the first steps, saving every step (F1)."""
  outcome = Outcome("kill -9, one process")
  chance = random.Random(0)
  workdir, committed, replayed, saves = lab.workdir("kill"), 0, 0, 0
  for one in tries(outcome, count, tick):
    before = max(train_rows(workdir), default=0)
    child = lab.start(workdir)
    one.expect(child.wait_for_step(1), f"no start: {child.output[-500:]}")
    resumed = child.resumed_from
    one.lost(max(committed - resumed, 0))
    # Saves take longer than steps: without this a slow machine commits few.
    child.wait_for_step(resumed + chance.randint(1, 6))
    replayed += max(before - resumed, 0)
    time.sleep(chance.uniform(0.0, 0.6))
    if child.process.poll() is not None and one.expect(
      child.end() == 0, child.output[-500:]
    ):
      # A fast machine finished the run: the next try needs another one.
      one.silent(lab.wrong_steps(workdir))
      workdir, committed = lab.workdir("kill"), 0
      continue
    child.kill()
    saves += newest(workdir) - committed
    committed = newest(workdir)
    one.silent(lab.wrong_steps(workdir))
  outcome.notes |= {"steps saved": saves, "steps done again": replayed}
  _end_of_killed_run(lab, workdir, outcome)
  return outcome


def _end_of_killed_run(lab: Lab, workdir, outcome: Outcome) -> None:
  """After all kills the run goes on to a step whose whole state is known."""
  step = -(-(newest(workdir) + 1) // GRID) * GRID
  if step > lab.num_steps:
    return
  child = lab.start(workdir, f"--config.checkpoint.keep={2 * GRID}")
  child.wait_for(lambda: newest(workdir) >= step, f"step {step}")
  child.send(signal.SIGTERM)
  child.end()
  same = step in committed_steps(workdir / "checkpoints")
  same = same and not lab.wrong_steps(workdir)
  outcome.notes["state after the last kill"] = (
    f"bit-identical at step {step}" if same else f"DIFFERS at step {step}"
  )
  outcome.silent += not same


def kill_in_retention(
  lab: Lab,
  count: int,
  tick: Callable[[], object],
  faults: Sequence[str] = _RETENTION,
) -> Outcome:
  """kill -9 around a commit and while the step before is removed (F6).

  Args:
    lab: with an uninterrupted run.
    count: of tries.
    tick: called after each.
    faults: names for `tests.faults.inject`, taken in turn.
  """
  outcome = Outcome("kill -9 in commit or clean-up")
  workdir = lab.workdir("retention", [GRID])
  keep_one = "--config.checkpoint.keep=1"
  for number, one in enumerate(tries(outcome, count, tick)):
    fault = faults[number % len(faults)]
    when = 1 + number // len(faults) % 3
    committed = newest(workdir)
    child = lab.start(workdir, keep_one, faults=[f"{fault}={when}"])
    code = child.end()
    one.expect(
      code == -signal.SIGKILL, f"{fault}: {code} {child.output[-500:]}"
    )
    resumed = child.resumed_from
    one.lost(max(committed - resumed, 0))
    one.expect(newest(workdir) >= resumed, f"{fault}: nothing to restore")
    numbered = [p.name for p in (workdir / "checkpoints").glob("[0-9]*")]
    steps = [int(name) for name in numbered if name.isdigit()]
    one.expect(
      sorted(steps) == committed_steps(workdir / "checkpoints"),
      f"{fault}: an incomplete step is left: {numbered}",
    )
    one.silent(lab.wrong_steps(workdir))
    if newest(workdir) > lab.num_steps - 10:
      workdir = lab.workdir("retention", [GRID])
  return outcome


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
