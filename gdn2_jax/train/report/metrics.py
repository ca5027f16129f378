"""From device scalars to rows, progress and the decision to give up."""

import datetime
import sys
from collections.abc import Callable
from typing import Any

import jax
from tqdm import tqdm

from gdn2_jax.train.report.throughput import Throughput
from gdn2_jax.train.report.writer import Writer


class DivergedError(RuntimeError):
  """Too many batches in a row had no finite update."""


class Progress:
  """A progress bar on a terminal, a line every so often elsewhere.

  Args:
    first_step: finished steps at the start.
    num_steps: of the whole run.
    say: prints a line; None keeps silent, as every process but the first.
  """

  def __init__(
    self, first_step: int, num_steps: int, say: Callable[[str], None] | None
  ):
    self._num_steps = num_steps
    self._say = say
    self._bar = None
    if say is not None and sys.stderr.isatty():
      self._bar = tqdm(
        total=num_steps,
        initial=first_step,
        unit="step",
        dynamic_ncols=True,
        smoothing=0.1,
      )

  def step(self, step: int) -> None:
    """Moves the bar to `step` finished steps."""
    if self._bar is not None:
      self._bar.update(step - self._bar.n)

  def row(self, step: int, values: dict[str, Any]) -> None:
    """Shows the numbers of a metrics row."""
    speed = values.get("tokens_per_s")
    if self._bar is not None:
      shown = {"loss": f"{values['loss']:.4f}"}
      if speed:
        shown["tokens/s"] = f"{speed:,.0f}"
      self._bar.set_postfix(shown)
    elif self._say is not None:
      line = f"step {step:>6}/{self._num_steps}  loss {values['loss']:.4f}"
      line += f"  grad {values['grad_norm']:.3f}  lr {values['lr']:.2e}"
      if speed:
        left = (self._num_steps - step) * values["step_s"]
        eta = datetime.timedelta(seconds=round(left))
        line += f"  {speed:,.0f} tokens/s  ETA {eta}"
      if "mfu" in values:
        line += f"  MFU {values['mfu']:.1%}"
      self._say(line)

  def say(self, line: str) -> None:
    """Prints a line without breaking the bar."""
    if self._bar is not None:
      self._bar.write(line)
    elif self._say is not None:
      self._say(line)

  def close(self) -> None:
    """Leaves the bar as it is."""
    if self._bar is not None:
      self._bar.close()


class MetricsReader:
  """Reads the metrics of step n - 1 while the devices compute step n.

  Args:
    writer: of the rows.
    throughput: restarted whenever the loop did something else than steps.
    progress: shows the rows.
    log_every: steps between rows.
    max_skipped: batches in a row without an update before DivergedError.
    note_skipped: (step, loss, gradient norm) -> a few words about the batch,
      called for each one without an update.
  """

  def __init__(
    self,
    writer: Writer,
    throughput: Throughput,
    progress: Progress,
    *,
    log_every: int,
    max_skipped: int,
    note_skipped: Callable[[int, float, float], str],
  ):
    self._writer = writer
    self._throughput = throughput
    self._progress = progress
    self._log_every = log_every
    self._max_skipped = max_skipped
    self._note_skipped = note_skipped
    self._pending: tuple[int, Any] | None = None
    self._measuring = False

  def push(self, step: int, metrics: dict[str, jax.Array]) -> None:
    """Takes the metrics of `step`, and reads those taken before."""
    self.flush()
    self._pending = (step, metrics)

  def flush(self) -> None:
    """Reads what is pending; waits for its step.

    Raises:
      DivergedError: max_skipped batches in a row were skipped.
    """
    if self._pending is None:
      return
    (step, metrics), self._pending = self._pending, None
    values = {k: v.item() for k, v in jax.device_get(metrics).items()}
    in_a_row = values.pop("skipped_in_a_row")
    self._progress.step(step)
    if not self._measuring:
      # The first step after a start or a pause may have compiled.
      self._throughput.restart(step)
      self._measuring = True
    records = ""
    if in_a_row:
      records = self._note_skipped(step, values["loss"], values["grad_norm"])
      self._progress.say(
        f"step {step}: loss {values['loss']}, gradient norm "
        f"{values['grad_norm']}: update skipped ({in_a_row} in a row), "
        f"{records}"
      )
    if step % self._log_every == 0:
      values |= self._throughput.read(step)
      self._writer.write(step, "train", values)
      self._progress.row(step, values)
    if in_a_row >= self._max_skipped:
      raise DivergedError(
        f"steps {step - in_a_row + 1} to {step}: {in_a_row} batches in a row "
        "gave no finite loss and gradient, or none below "
        f"--config.optimizer.skip_norm (--config.max_skipped="
        f"{self._max_skipped}); the parameters are those before step "
        f"{step - in_a_row + 1}. The last batch had {records}; skipped.jsonl "
        "in the workdir has them all. Try a lower --config.optimizer.lr, a "
        "longer --config.optimizer.warmup_fraction, or "
        "--config.model.dtype=float32"
      )

  def pause(self) -> None:
    """The loop is about to do something that is not training."""
    self.flush()
    self._measuring = False
