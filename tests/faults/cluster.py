"""Other devices after a restart, and runs of two processes."""

import math
import random
import re
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from gdn2_jax.train.processes import RETRY
from tests.faults.child import Child, train_rows
from tests.faults.lab import GRID, Lab, digests_of, newest
from tests.faults.outcome import Outcome, Try, tries

# (devices, data, fsdp, tensor), one after the other on one workdir.
_MESHES = ((8, 1, 8, 1), (8, 1, 4, 2), (1, 1, 1, 1), (8, 2, 2, 2))
_STEPS = 20
_TOLERANCE = 1e-5


def other_meshes(lab: Lab, count: int, tick: Callable[[], object]) -> Outcome:
  """8 -> 4 x 2 -> 1 -> 2 x 2 x 2 devices (F11).

  Every restore compares the digest with the one of the mesh before. From the
  same checkpoint, each mesh has the losses of one device to 1e-5.
  """
  outcome, largest = Outcome("other meshes"), 0.0
  for number, one in enumerate(tries(outcome, count, tick)):
    devices, data, fsdp, tensor = _MESHES[number % len(_MESHES)]
    flags = [
      f"--config.mesh.data={data}",
      f"--config.mesh.fsdp={fsdp}",
      f"--config.mesh.tensor={tensor}",
      "--config.checkpoint.every_steps=0",
    ]
    if number % len(_MESHES) == 0:
      chain = lab.workdir("chain", [10])
    # On a copy of the same checkpoint: the losses of 20 steps.
    workdir = lab.workdir("mesh", [10])
    child = lab.start(workdir, *flags, devices=devices)
    child.wait_for_step(10 + _STEPS)
    child.send(signal.SIGTERM)
    one.expect(child.end() == 0, child.output[-500:])
    rows = train_rows(workdir)
    errors = [
      abs(rows[s][0] - lab.truth[s][0]) / lab.truth[s][0]
      for s in range(11, 11 + _STEPS)
      if s in rows
    ]
    worst = max(errors, default=math.inf)
    largest = max(largest, worst)
    outcome.notes["largest relative difference"] = float(f"{largest:.1e}")
    one.silent([0] if worst > _TOLERANCE else [])
    # In the chain: what the mesh before has saved is restored on this one.
    before = newest(chain)
    child = lab.start(chain, *flags, devices=devices)
    child.wait_for_step(before + 1)
    child.send(signal.SIGTERM)
    one.expect(child.end() == 0, child.output[-500:])
    one.lost(max(before - child.resumed_from, 0))
    one.expect("WARNING" not in child.output, "the digest differs")
    one.expect(before in digests_of(chain), f"step {before} was set aside")
  return outcome


HEARTBEAT = 10.0
_WATCHDOG = 4.0
_RETRYABLE = (RETRY, -6, 134, -9, 137)


class Pair:
  """Two training commands that meet on this host.

  Args:
    lab: has the config.
    workdir: shared by both.
    flags: of both.
    faults: of process 0 and of process 1.
  """

  def __init__(
    self,
    lab: Lab,
    workdir: Path,
    *flags: str,
    faults: Sequence[Sequence[str]] = ((), ()),
  ):
    with socket.socket() as probe:
      probe.bind(("127.0.0.1", 0))
      port = probe.getsockname()[1]
    self.workdir = workdir
    self.children: list[Child] = []
    for number in (0, 1):
      place = [
        f"--coordinator_address=127.0.0.1:{port}",
        "--num_processes=2",
        f"--process_id={number}",
        f"--heartbeat_timeout={HEARTBEAT:g}",
        "--init_timeout=120",
      ]
      child = lab.start(workdir, *flags, *place, faults=faults[number])
      self.children.append(child)

  @property
  def first(self) -> Child:
    """Process 0, the one that prints."""
    return self.children[0]

  @property
  def output(self) -> str:
    """The last words of both."""
    return "\n--\n".join(child.output[-700:] for child in self.children)

  def end(self, timeout: float = 300.0) -> list[int]:
    """Exit codes of both."""
    return [child.end(timeout) for child in self.children]

  def kill(self) -> None:
    """kill -9 for both."""
    for child in self.children:
      child.kill()


def prepare(lab: Lab) -> None:
  """The uninterrupted run of two processes.

  Raises:
    RuntimeError: it failed; with the last words of both.
  """
  lab.straight.mkdir(exist_ok=True)
  flags = [
    f"--config.checkpoint.every_steps={GRID}",
    "--config.checkpoint.keep=1000",
  ]
  pair = Pair(lab, lab.straight, *flags)
  if any(pair.end()):
    raise RuntimeError(pair.output)
  lab.adopt_truth()


def kill_one(lab: Lab, count: int, tick: Callable[[], object]) -> Outcome:
  """kill -9 for one of two, now the one, now the other (F2)."""
  outcome = Outcome("kill -9, one of two processes")
  chance = random.Random(3)
  workdir, committed, replayed, saves = lab.workdir("kill-one"), 0, 0, 0
  for number, one in enumerate(tries(outcome, count, tick)):
    before = max(train_rows(workdir), default=0)
    pair = Pair(lab, workdir)
    if not one.expect(pair.first.wait_for_step(1), f"no start: {pair.output}"):
      pair.kill()
      continue
    resumed = pair.first.resumed_from
    one.lost(max(committed - resumed, 0))
    replayed += max(before - resumed, 0)
    pair.first.wait_for_step(resumed + chance.randint(1, 4))
    time.sleep(chance.uniform(0.0, 0.6))
    victim, other = pair.children[number % 2], pair.children[1 - number % 2]
    victim.kill()
    _other_ends(one, outcome, pair, other, time.monotonic())
    saves += newest(workdir) - committed
    committed = newest(workdir)
    one.silent(lab.wrong_steps(workdir))
    if committed > lab.num_steps // 2:
      workdir, committed = lab.workdir("kill-one"), 0
  outcome.notes |= {"steps saved": saves, "steps done again": replayed}
  return outcome


def _other_ends(
  one: Try, outcome: Outcome, pair: Pair, other: Child, start: float
) -> None:
  """The process that is left ends by itself, and says: try again."""
  try:
    code = other.end(HEARTBEAT + 60.0)
  except TimeoutError:
    one.expect(False, "the other process stays for ever")
    return
  seconds = time.monotonic() - start
  outcome.largest("other ends after, s", seconds)
  one.expect(code in _RETRYABLE, f"other ends with {code}: {pair.output}")
  one.expect(seconds < HEARTBEAT + 5.0, f"other ends after {seconds:.1f} s")


def sigterm_one(lab: Lab, count: int, tick: Callable[[], object]) -> Outcome:
  """SIGTERM for one of two: both save the same step and exit 0 (F4)."""
  outcome = Outcome("SIGTERM, one of two processes")
  workdir, saved = lab.workdir("term-one"), 0
  for number, one in enumerate(tries(outcome, count, tick)):
    if saved > lab.num_steps // 2:
      workdir, saved = lab.workdir("term-one"), 0
    pair = Pair(lab, workdir, "--config.checkpoint.every_steps=0")
    if not one.expect(pair.first.wait_for_step(1), f"no start: {pair.output}"):
      pair.kill()
      continue
    one.lost(max(saved - pair.first.resumed_from, 0))
    start = time.monotonic()
    pair.children[number % 2].send(signal.SIGTERM)
    codes = pair.end()
    outcome.largest("longest exit, s", time.monotonic() - start)
    one.expect(codes == [0, 0], f"exit codes {codes}: {pair.output}")
    found = re.search(r"saved step (\d+), stopping", pair.first.output)
    saved = newest(workdir)
    one.expect(found is not None and int(found[1]) == saved, pair.output)
    one.silent(lab.wrong_steps(workdir))
  return outcome


def stuck_one(lab: Lab, count: int, tick: Callable[[], object]) -> Outcome:
  """One of two is alive but stuck: it ends, and so does the other (F22)."""
  outcome = Outcome("stuck, one of two processes")
  outcome.notes["watchdog, s"] = _WATCHDOG
  for number, one in enumerate(tries(outcome, count, tick)):
    workdir = lab.workdir("stuck-one", [10])
    faults = [["stuck=14"], []] if number % 2 else [[], ["stuck=14"]]
    flags = [f"--config.watchdog_seconds={_WATCHDOG}"]
    pair = Pair(lab, workdir, *flags, faults=faults)
    victim, other = pair.children[1 - number % 2], pair.children[number % 2]
    victim.wait_for_text("stuck at")
    start = time.monotonic()
    codes = [victim.end(60.0)]
    seconds = time.monotonic() - start
    outcome.largest("longest stall, s", seconds)
    one.expect(seconds <= _WATCHDOG + 1.0, f"ended after {seconds:.1f} s")
    _other_ends(one, outcome, pair, other, time.monotonic())
    # Both watchdogs see it; who ends first takes the other along.
    one.expect(codes[0] in _RETRYABLE, f"exit code {codes}: {pair.output}")
    one.lost(max(13 - newest(workdir), 0))
    one.silent(lab.wrong_steps(workdir))
  return outcome
