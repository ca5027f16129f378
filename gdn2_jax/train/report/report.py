"""Metrics of a run: rows, progress, evaluations, and giving up."""

import datetime
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
from tqdm import tqdm

from gdn2_jax.model.accounting import train_flops_per_token
from gdn2_jax.train.config import TrainConfig
from gdn2_jax.train.report.evaluation import evaluate, write_summary
from gdn2_jax.train.report.skipped import SkippedBatches
from gdn2_jax.train.report.throughput import Throughput
from gdn2_jax.train.report.writer import Writer


class DivergedError(RuntimeError):
  """Too many batches in a row had no finite update."""


class Progress:
  """A progress bar on a terminal, else lines; silent where `say` is None."""

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
      self._bar = None


class Report:
  """Metrics files, progress and evaluations of a run from `first_step` on."""

  def __init__(
    self,
    config: TrainConfig,
    workdir: pathlib.Path,
    dataset: Any,
    first_step: int,
    say: Callable[[str], None] | None,
  ):
    self._config = config
    self._workdir = workdir
    self._dataset = dataset
    self._writer = Writer(workdir, first_step)
    self._progress = Progress(first_step, config.num_steps, say)
    self._throughput = Throughput(
      config.data.batch_size * config.data.seq_len,
      train_flops_per_token(config.model, config.data.seq_len),
    )
    self._skipped = SkippedBatches(workdir / "skipped.jsonl", dataset)
    self._pending: tuple[int, Any] | None = None
    self._measuring = False

  def push(self, step: int, metrics: dict[str, jax.Array]) -> None:
    """Takes the metrics of `step`, and reads those taken before."""
    self.flush()
    self._pending = (step, metrics)

  def flush(self) -> None:
    """Reads what is pending, waiting for its step; may raise DivergedError."""
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
      records = self._skipped.note(step, values["loss"], values["grad_norm"])
      self._progress.say(
        f"step {step}: loss {values['loss']}, gradient norm "
        f"{values['grad_norm']}: update skipped ({in_a_row} in a row), "
        f"{records}"
      )
    if step % self._config.log_every == 0:
      values |= self._throughput.read(step)
      self._writer.write(step, "train", values)
      self._progress.row(step, values)
    if in_a_row >= self._config.max_skipped:
      raise DivergedError(
        f"steps {step - in_a_row + 1} to {step}: {in_a_row} batches in a row "
        "gave no finite loss and gradient, or none below "
        f"--config.optimizer.skip_norm (--config.max_skipped="
        f"{self._config.max_skipped}); the parameters are those before step "
        f"{step - in_a_row + 1}. The last batch had {records}; skipped.jsonl "
        "in the workdir has them all. Try a lower --config.optimizer.lr, a "
        "longer --config.optimizer.warmup_fraction, or "
        "--config.model.dtype=float32"
      )

  def pause(self) -> None:
    """Reads what is pending before work that is not training."""
    self.flush()
    self._measuring = False

  def evaluate(self, step: int, params: Any) -> None:
    """Writes and prints the held-out loss at the training length."""
    (report,), row = evaluate(self._config, params, self._dataset, (1,))
    self._writer.write(step, "eval", row)
    self._progress.say(
      f"step {step:>6}  validation {report.nats_per_token:.4f} nats/token, "
      f"{report.bits_per_byte:.4f} bits/byte"
    )

  def finish(self, step: int, params: Any) -> None:
    """Writes the last row, eval.json and loss.png; prints the table."""
    self._progress.close()
    multiples = self._config.eval.length_multiples
    models, row = evaluate(self._config, params, self._dataset, multiples)
    self._writer.write(step, "final", row)
    if jax.process_index() == 0:
      table = write_summary(
        self._config, self._workdir, self._dataset, step, models
      )
      self._progress.say("")
      self._progress.say(table)

  def close(self) -> None:
    """Closes the files and leaves the bar as it is."""
    self._progress.close()
    self._writer.close()
