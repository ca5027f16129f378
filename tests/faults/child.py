"""A training command in a process of its own, and what it left behind."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from gdn2_jax.train.report.writer import read_rows

Row = tuple[float, float, float]

# A start takes seconds; a machine that is busy with other things, minutes.
PATIENCE = 300.0


def train_rows(workdir: pathlib.Path) -> dict[int, Row]:
  """{step: (loss, gradient norm, learning rate)} of the finished steps."""
  path = workdir / "metrics.jsonl"
  if not path.exists():
    return {}
  return {
    row["step"]: (row["loss"], row["grad_norm"], row["lr"])
    for row in read_rows(path)
    if row["kind"] == "train"
  }


class Child:
  """`python -m gdn2_jax.train`, running.

  Args:
    config_file: with get_config().
    workdir: of the run.
    flags: further flags of the training command.
    faults: what goes wrong inside, see `tests.faults.inject`.
    log: file for all its output; overwritten.
    devices: stand-in devices it sees.
  """

  def __init__(
    self,
    config_file: pathlib.Path,
    workdir: pathlib.Path,
    *flags: str,
    faults: Sequence[str] = (),
    log: pathlib.Path | None = None,
    devices: int = 1,
  ):
    self.workdir = workdir
    self.log = log or workdir.with_name(workdir.name + ".log")
    module = "tests.faults.inject" if faults else "gdn2_jax.train"
    command = [sys.executable, "-m", module]
    command += [*faults, "--"] if faults else []
    command += [f"--config={config_file}", f"--workdir={workdir}", *flags]
    with open(self.log, "wb") as output:
      self.process = subprocess.Popen(
        command,
        cwd=pathlib.Path(__file__).parents[2],
        env=environment(devices),
        stdout=output,
        stderr=subprocess.STDOUT,
      )

  @property
  def output(self) -> str:
    """All that it printed so far."""
    return self.log.read_text(encoding="utf-8", errors="replace")

  def wait_for(self, condition: Callable[[], bool], what: str) -> bool:
    """Polls until the condition holds; False if the process ended before.

    Raises:
      TimeoutError: nothing happened for `PATIENCE` seconds; it was killed.
    """
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
      ended = self.process.poll() is not None
      if condition():
        return True
      if ended:
        return False
      time.sleep(0.01)
    self.kill()
    raise TimeoutError(
      f"no {what} after {PATIENCE:g} s:\n{self.output[-2000:]}"
    )

  def wait_for_text(self, text: str) -> bool:
    """Polls until it printed `text`; False if it ended without."""
    return self.wait_for(lambda: text in self.output, repr(text))

  @property
  def resumed_from(self) -> int:
    """The step it says it resumed from; 0 if it began anew."""
    found = re.search(r"^resumed from step (\d+)", self.output, re.MULTILINE)
    return int(found[1]) if found else 0

  @property
  def step(self) -> int:
    """The last step this process itself has reported, 0 before the first."""
    steps = re.findall(r"^step +(\d+)/", self.output, re.MULTILINE)
    return int(steps[-1]) if steps else 0

  def wait_for_step(self, step: int) -> bool:
    """Polls until it has reported `step`; False if it ended before."""
    return self.wait_for(lambda: self.step >= step, f"step {step}")

  def send(self, number: signal.Signals) -> None:
    """Sends a signal, unless it has ended."""
    if self.process.poll() is None:
      self.process.send_signal(number)

  def end(self, timeout: float = PATIENCE) -> int:
    """Waits for its end; the exit code, negative for a signal.

    Raises:
      TimeoutError: it went on for longer; it was killed.
    """
    try:
      return self.process.wait(timeout)
    except subprocess.TimeoutExpired as e:
      self.kill()
      raise TimeoutError(
        f"still running after {timeout:g} s:\n{self.output[-2000:]}"
      ) from e

  def kill(self) -> int:
    """kill -9; the exit code."""
    self.process.kill()
    return self.process.wait()


def environment(devices: int = 1) -> dict[str, str]:
  """CPU devices; programs that compile fast rather than run fast."""
  return os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(devices),
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
  }
