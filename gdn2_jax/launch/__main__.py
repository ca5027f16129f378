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

import sys
import time
from collections.abc import Sequence

from absl import flags

from gdn2_jax import cli
from gdn2_jax.launch.processes import RETRYABLE, Gang, Stop, say, verdict

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
      say(f"giving up after {restarts} restarts (--max_restarts)")
      return code
    restarts += 1
    say(f"starting all again ({restarts} of {_MAX_RESTARTS.value})")
    # The cause of the failure may need time to pass.
    time.sleep(min(2.0 ** (restarts - 1), 30.0))
    if stop.received:
      return code


def main(argv: list[str]) -> None:
  """Entry point: starts the command after --."""
  command = argv[1:]
  if not command or command[0].startswith("-"):
    cli.fail(
      "expected a command after --, as in: "
      "python -m gdn2_jax.launch --num_processes=2 -- "
      "python -m gdn2_jax.train --config=tiny_cpu --workdir=runs/two"
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
