"""Disks that fill up, and saves that fail."""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator

from tests.faults.lab import Lab, newest
from tests.faults.outcome import Outcome, tries

_DISK_MB = 6


@contextlib.contextmanager
def small_disk(path: pathlib.Path) -> Iterator[bool]:
  """Mounts a few megabytes of memory there, if this machine lets us."""
  path.mkdir()
  done = subprocess.run(
    ["mount", "-t", "tmpfs", "-o", f"size={_DISK_MB}m", "tmpfs", str(path)],
    capture_output=True,
    check=False,
  )
  try:
    yield done.returncode == 0
  finally:
    if done.returncode == 0:
      subprocess.run(["umount", "--lazy", str(path)], check=False)


def disk_full(lab: Lab, count: int, tick: Callable[[], object]) -> Outcome:
  """Checkpoints fill the disk, the run ends, and goes on when it can (F14).

  On a disk of its own where this machine allows that, else with an error
  where the commit would be.
  """
  outcome = Outcome("disk full")
  for number, one in enumerate(tries(outcome, count, tick)):
    workdir = lab.workdir("full", [10])
    directory, disk = workdir / "checkpoints", lab.folder / f"disk-{number}"
    with small_disk(disk) as real:
      outcome.notes["disk"] = "tmpfs" if real else "simulated"
      faults = [] if real else ["full_disk=4"]
      if real:
        shutil.move(directory, disk / "checkpoints")
        directory.symlink_to(disk / "checkpoints")
      child = lab.start(workdir, "--config.checkpoint.keep=1000", faults=faults)
      code, output = child.end(), child.output
      one.expect(code == 1, f"exit code {code}: {output[-500:]}")
      one.expect(
        output.count("could not be written") == 3
        and "error: checkpoint of step" in output,
        f"not reported: {output[-500:]}",
      )
      one.expect("Traceback" not in output[-300:], output[-500:])
      committed = newest(workdir)
      one.expect(committed > 10, f"newest is {committed}")
      # Somebody makes room.
      shutil.rmtree(directory / "10")
      child = lab.start(workdir, "--config.checkpoint.keep=2")
      child.wait_for_step(committed + 3)
      child.send(signal.SIGTERM)
      one.expect(child.end() == 0, child.output[-500:])
      one.lost(max(committed - child.resumed_from, 0))
      tmp = [name for name in os.listdir(directory) if "tmp" in name]
      one.expect(not tmp, f"space not given back: {tmp}")
      one.silent(lab.wrong_steps(workdir))
  return outcome


def failed_last_save(
  lab: Lab, count: int, tick: Callable[[], object]
) -> Outcome:
  """The save that SIGTERM asks for fails: not exit 0, not the newest (F16)."""
  outcome = Outcome("last save fails")
  for one in tries(outcome, count, tick):
    workdir = lab.workdir("last", [10])
    child = lab.start(
      workdir, "--config.checkpoint.every_steps=0", faults=["full_disk=1"]
    )
    child.wait_for_step(12)
    child.send(signal.SIGTERM)
    code = child.end()
    one.expect(code == 1, f"exit code {code}: {child.output[-500:]}")
    one.expect("error: checkpoint of step" in child.output, "not reported")
    one.lost(0 if newest(workdir) == 10 else 1)
    one.silent(lab.wrong_steps(workdir))
  return outcome
