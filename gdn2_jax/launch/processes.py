"""Processes of one start: environments, signals, exit codes."""

import ctypes
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from gdn2_jax.train.processes import RETRY

RETRYABLE = (RETRY, 134, 137, 143)
_PR_SET_PDEATHSIG = 1


@dataclasses.dataclass
class Stop:
  """Signals that ask the launcher to stop."""

  received: int = 0

  def install(self) -> None:
    """Counts SIGTERM and SIGINT from now on."""
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, self._count)

  def _count(self, number: int, frame) -> None:
    del number, frame
    self.received += 1


def exit_code(returncode: int) -> int:
  """Return code in a shell's terms: 137 for a process killed by signal 9."""
  return 128 - returncode if returncode < 0 else returncode


def verdict(codes: Sequence[int]) -> int:
  """Exit code for all processes: the first fatal one, else the first failed."""
  # A process with a fatal code is the cause: the others lost a peer by it.
  failed = [code for code in codes if code]
  fatal = [code for code in failed if code not in RETRYABLE]
  return (fatal or failed or [0])[0]


def free_port() -> int:
  """A TCP port of this host that nothing listens on."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def environment(process_id: int, gpus: int | None, cpus: int | None) -> dict:
  """Environment of a process: that of the launcher, and its devices."""
  env = dict(os.environ)
  if gpus is not None:
    mine = range(process_id * gpus, (process_id + 1) * gpus)
    env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, mine))
  if cpus is not None:
    env |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(cpus)}
  return env


def _end_with_parent() -> None:
  """Runs in the child: the kernel sends SIGTERM if the launcher dies."""
  ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class Gang:
  """The processes of one start, each in a process group of its own."""

  def __init__(
    self,
    command: Sequence[str],
    num_processes: int,
    gpus: int | None = None,
    cpus: int | None = None,
  ):
    address = f"127.0.0.1:{free_port()}"
    self._children = []
    for process_id in range(num_processes):
      place = [
        f"--coordinator_address={address}",
        f"--num_processes={num_processes}",
        f"--process_id={process_id}",
      ]
      self._children.append(
        subprocess.Popen(
          [*command, *place],
          env=environment(process_id, gpus, cpus),
          # Ctrl-C on the terminal is for the launcher alone.
          start_new_session=True,
          preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
      )

  @property
  def pids(self) -> list[int]:
    """Process ids, by place."""
    return [child.pid for child in self._children]

  def signal(self, number: int) -> None:
    """Sends a signal to all that run, and to what they have started."""
    for child in self._children:
      if child.poll() is None:
        os.killpg(child.pid, number)

  def kill(self) -> None:
    """Ends all that run, even those that are stopped, and waits for them."""
    self.signal(signal.SIGKILL)
    for child in self._children:
      child.wait()

  def wait(self, stop: Stop, grace: float, stop_grace: float) -> list[int]:
    """Exit codes in the order in which the processes ended; see the flags."""
    ended: dict[int, int] = {}
    deadline, told = float("inf"), 0
    while len(ended) < len(self._children):
      for i, child in enumerate(self._children):
        if i not in ended and child.poll() is not None:
          ended[i] = exit_code(child.returncode)
          if ended[i]:
            say(f"process {i} ended with code {ended[i]}")
            deadline = min(deadline, time.monotonic() + grace)
      if stop.received and not told:
        deadline = min(deadline, time.monotonic() + stop_grace)
        self.signal(signal.SIGTERM)
      told = stop.received
      if told > 1 or time.monotonic() > deadline:
        self.signal(signal.SIGKILL)
      time.sleep(0.05)
    return list(ended.values())


def say(line: str) -> None:
  """Prints a line of the launcher to stderr."""
  print(f"launch: {line}", file=sys.stderr, flush=True)
