r"""Starts several processes of one run on this host, and restarts them.

  python -m gdn2_jax.launch --num_processes=4 --gpus_per_process=2 -- \
    python -m gdn2_jax.train --config=configs/gdn2_1p3b.py \
    --workdir=runs/gdn2_1p3b --config.mesh.fsdp=-1 --config.grad_accum=4

The command after -- is started --num_processes times, each time with another
--process_id and with the same --coordinator_address and --num_processes. If one
of them is lost, all are ended and started again, up to --max_restarts times;
they resume from the newest checkpoint. SIGTERM and Ctrl-C are passed on as
SIGTERM: the run saves its step and ends with 0. A second one kills.

These exit codes restart all: 75 (a peer was lost or a step was stuck), 134
(aborted), 137 (killed), 143 (ended by SIGTERM before it was handled). Any other
code ends the launcher with that code.

Rehearse on a machine without GPUs with --cpu_devices_per_process=2.
"""

import ctypes
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from absl import app, flags

from gdn2_jax import cli
from gdn2_jax.train.processes import RETRY

_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", 2, "Processes to start.", lower_bound=1
)
_MAX_RESTARTS = flags.DEFINE_integer(
  "max_restarts", 10, "Restarts in a row before giving up.", lower_bound=0
)
_HEALTHY_AFTER = flags.DEFINE_float(
  "healthy_after",
  600.0,
  "Seconds after which a start counts as good and resets the restart count.",
)
_GRACE = flags.DEFINE_float(
  "grace",
  15.0,
  "Seconds for the other processes to end after one has failed.",
  lower_bound=0.0,
)
_STOP_GRACE = flags.DEFINE_float(
  "stop_grace",
  600.0,
  "Seconds for the processes to save and end after SIGTERM.",
  lower_bound=0.0,
)
_GPUS = flags.DEFINE_integer(
  "gpus_per_process",
  None,
  "GPUs of each process (sets CUDA_VISIBLE_DEVICES).",
  lower_bound=1,
)
_CPU_DEVICES = flags.DEFINE_integer(
  "cpu_devices_per_process",
  None,
  "Run on the CPU, with this many simulated devices in each process.",
  lower_bound=1,
)

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
            _say(f"process {i} ended with code {ended[i]}")
            deadline = min(deadline, time.monotonic() + grace)
      if stop.received and not told:
        deadline = min(deadline, time.monotonic() + stop_grace)
        self.signal(signal.SIGTERM)
      told = stop.received
      if told > 1 or time.monotonic() > deadline:
        self.signal(signal.SIGKILL)
      time.sleep(0.05)
    return list(ended.values())


def _say(line: str) -> None:
  print(f"launch: {line}", file=sys.stderr, flush=True)


def run(command: Sequence[str], stop: Stop) -> int:
  """Starts and restarts the command; returns the exit code."""
  restarts = 0
  while True:
    started = time.monotonic()
    gang = Gang(command, _NUM_PROCESSES.value, _GPUS.value, _CPU_DEVICES.value)
    try:
      codes = gang.wait(stop, _GRACE.value, _STOP_GRACE.value)
    finally:
      gang.kill()
    code = verdict(codes)
    if stop.received or code not in RETRYABLE:
      return code
    if time.monotonic() - started > _HEALTHY_AFTER.value:
      restarts = 0
    if restarts == _MAX_RESTARTS.value:
      _say(f"giving up after {restarts} restarts (--max_restarts)")
      return code
    restarts += 1
    _say(f"starting all again ({restarts} of {_MAX_RESTARTS.value})")
    # The cause of the failure may need time to pass.
    time.sleep(min(2.0 ** (restarts - 1), 30.0))
    if stop.received:
      return code


def main(argv: list[str]) -> None:
  """Entry point: starts the command after --."""
  command = argv[1:]
  if not command or command[0].startswith("-"):
    raise app.UsageError(
      "expected a command after --, as in: "
      "python -m gdn2_jax.launch --num_processes=2 -- "
      "python -m gdn2_jax.train --config=configs/tiny_cpu.py --workdir=runs/two"
    )
  stop = Stop()
  stop.install()
  try:
    code = run(command, stop)
  except FileNotFoundError as e:
    cli.fail(f"{command[0]}: {e.strerror}")
  sys.exit(code)


if __name__ == "__main__":
  cli.run(main, __doc__)
