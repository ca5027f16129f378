"""Metrics of a run: files, progress, evaluations, divergence."""

import dataclasses
import datetime
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from tqdm import tqdm

from gdn2_jax.eval.loss.ngram import ngram_baselines
from gdn2_jax.eval.loss.perplexity import evaluate_lengths
from gdn2_jax.eval.loss.report import LossReport, format_table
from gdn2_jax.model.accounting import train_flops_per_token
from gdn2_jax.train.config import TrainConfig
from gdn2_jax.train.report.gates import layer_gates
from gdn2_jax.train.report.interval import Interval
from gdn2_jax.train.report.plot import plot_loss
from gdn2_jax.train.report.skipped import SkippedBatches
from gdn2_jax.train.report.throughput import Throughput
from gdn2_jax.train.report.writer import read_rows, write_json
from gdn2_jax.train.report.writers import Writer, open_writers


class DivergedError(RuntimeError):
  """Too many batches in a row had no finite update."""


class Progress:
  """A progress bar on a terminal, else lines."""

  def __init__(
    self, first_step: int, num_steps: int, say: Callable[[str], None]
  ):
    self._num_steps = num_steps
    self._say = say
    self._bar = tqdm(
      total=num_steps,
      initial=first_step,
      unit="step",
      dynamic_ncols=True,
      smoothing=0.1,
      disable=jax.process_index() > 0 or not sys.stderr.isatty(),
    )

  def step(self, step: int) -> None:
    """Moves the bar to `step` finished steps."""
    self._bar.update(step - self._bar.n)

  def row(self, step: int, values: dict[str, Any]) -> None:
    """Shows the numbers of a metrics row."""
    speed = values.get("tokens_per_s")
    if not self._bar.disable:
      shown = {"loss": f"{values['loss']:.4f}"}
      if speed:
        shown["tokens/s"] = f"{speed:,.0f}"
      self._bar.set_postfix(shown)
      return
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
    (self._say if self._bar.disable else self._bar.write)(line)

  def close(self) -> None:
    """Ends the bar where it is; lines are printed from then on."""
    self._bar.close()


class Report:
  """Metrics files, progress and evaluations of a run from `first_step` on.

  Attributes:
    interval: sums since the last row, to be stored with a checkpoint.
  """

  def __init__(
    self,
    config: TrainConfig,
    workdir: pathlib.Path,
    dataset: Any,
    first_step: int,
    say: Callable[[str], None],
    writers: Sequence[Writer] = (),
    interval: Interval | None = None,
  ):
    self.interval = interval or Interval()
    self._config = config
    self._workdir = workdir
    self._dataset = dataset
    self._writer = open_writers(config, workdir, first_step, writers)
    self._progress = Progress(first_step, config.num_steps, say)
    self._throughput = Throughput(
      config.data.batch_size * config.data.seq_len,
      train_flops_per_token(config.model, config.data.seq_len),
    )
    self._skipped = SkippedBatches(workdir / "skipped.jsonl", dataset)
    self._pending: tuple[int, Any] | None = None
    self._measuring = False

  def push(self, step: int, metrics: dict[str, jax.Array]) -> None:
    """Keeps the metrics of `step`, and reads those of the step before."""
    self.flush()
    self._pending = (step, metrics)

  def flush(self) -> None:
    """Reads the pending metrics once computed; may raise DivergedError."""
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
    else:
      self.interval.add(values)
    if step % self._config.log_every == 0:
      values = self.interval.take(values) | self._throughput.read(step)
      self._write(step, "train", values)
      self._progress.row(step, values)
    if in_a_row >= self._config.max_skipped:
      raise DivergedError(
        f"steps {step - in_a_row + 1} to {step}: {in_a_row} batches in a row "
        "(--config.max_skipped) had a loss or gradient that is not finite, or "
        "a gradient norm above --config.optimizer.skip_norm; the parameters "
        f"are those before step {step - in_a_row + 1}. The last batch had "
        f"{records}; skipped.jsonl in the workdir has them all. Try a lower "
        "--config.optimizer.lr, a longer --config.optimizer.warmup_fraction, "
        "or --config.model.dtype=float32"
      )

  def pause(self) -> None:
    """Reads the pending metrics before work that is not training."""
    self.flush()
    self._measuring = False

  def evaluate(self, step: int, params: Any) -> None:
    """Writes and prints the held-out loss at the training length."""
    (report,) = self._measure(step, "eval", params, (1,)).values()
    self._progress.say(
      f"step {step:>6}  validation {report.nats_per_token:.4f} nats/token, "
      f"{report.bits_per_byte:.4f} bits/byte"
    )

  def finish(self, step: int, params: Any) -> None:
    """Writes the last row, eval.json and loss.png; prints the table."""
    self._progress.close()
    multiples = self._config.eval.length_multiples
    models = self._measure(step, "final", params, multiples)
    if jax.process_index() == 0:
      self._progress.say("")
      self._progress.say(self._summarize(step, models))

  def _measure(
    self, step: int, kind: str, params: Any, multiples: tuple[int, ...]
  ) -> dict[str, LossReport]:
    """Held-out losses by multiple of the training length; writes their row."""
    reports = evaluate_lengths(
      self._config.model,
      params,
      self._dataset,
      seq_len=self._config.data.seq_len,
      config=dataclasses.replace(self._config.eval, length_multiples=multiples),
    )
    found = {f"{n}x": r for n, r in zip(multiples, reports, strict=True)}
    row = {}
    for name, report in found.items():
      row[f"loss_{name}"] = report.nats_per_token
      row[f"bits_per_byte_{name}"] = report.bits_per_byte
    if self._config.report.gates:
      row |= layer_gates(self._config, params, self._dataset)
    self._write(step, kind, row)
    return found

  def _write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
    tokens = step * self._config.data.batch_size * self._config.data.seq_len
    self._writer.write(step, kind, {**values, "tokens_seen": tokens})

  def _summarize(self, step: int, models: dict[str, LossReport]) -> str:
    """Writes eval.json and loss.png; returns a table with the baselines."""
    baselines = ngram_baselines(
      self._dataset,
      seq_len=self._config.data.seq_len,
      # No limit, like 0 batches for the model.
      rows=self._config.eval.batches * self._config.eval.batch_size or None,
    )
    write_json(
      self._workdir / "eval.json",
      {
        "step": step,
        "model": {name: report.to_json() for name, report in models.items()},
        "baselines": {report.name: report.to_json() for report in baselines},
      },
    )
    plot_loss(
      self._workdir / "loss.png",
      read_rows(self._workdir / "metrics.jsonl"),
      {report.name: report.nats_per_token for report in baselines},
    )
    return format_table([*models.values(), *baselines])

  def close(self) -> None:
    """Closes the files and ends the bar."""
    self._progress.close()
    self._writer.close()
