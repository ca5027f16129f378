"""Held-out loss of a run: at intervals, and beside baselines at its end."""

import dataclasses
import pathlib
from typing import Any

from gdn2_jax.eval.ngram import ngram_baselines
from gdn2_jax.eval.perplexity import evaluate_lengths
from gdn2_jax.eval.report import LossReport, format_table
from gdn2_jax.train.config import TrainConfig
from gdn2_jax.train.report import writer as writer_lib
from gdn2_jax.train.report.plot import plot_loss


def evaluate(
  config: TrainConfig, params: Any, dataset: Any, multiples: tuple[int, ...]
) -> tuple[list[LossReport], dict[str, float]]:
  """Reports for multiples of the training length, and their metrics row."""
  reports = evaluate_lengths(
    config.model,
    params,
    dataset,
    seq_len=config.data.seq_len,
    config=dataclasses.replace(config.eval, length_multiples=multiples),
  )
  row = {}
  for multiple, report in zip(multiples, reports, strict=True):
    row[f"loss_{multiple}x"] = report.nats_per_token
    row[f"bits_per_byte_{multiple}x"] = report.bits_per_byte
  return reports, row


def write_summary(
  config: TrainConfig,
  workdir: pathlib.Path,
  dataset: Any,
  step: int,
  models: list[LossReport],
) -> str:
  """Writes eval.json and loss.png; returns the table beside n-gram baselines.

  All rows score the same validation text, so they compare directly.
  """
  baselines = ngram_baselines(
    dataset,
    seq_len=config.data.seq_len,
    # No limit, like 0 batches for the model.
    rows=config.eval.batches * config.eval.batch_size or None,
  )
  multiples = config.eval.length_multiples
  writer_lib.write_json(
    workdir / "eval.json",
    {
      "step": step,
      "model": {
        f"{multiple}x": report.to_json()
        for multiple, report in zip(multiples, models, strict=True)
      },
      "baselines": {report.name: report.to_json() for report in baselines},
    },
  )
  plot_loss(
    workdir / "loss.png",
    writer_lib.read_rows(workdir / "metrics.jsonl"),
    {report.name: report.nats_per_token for report in baselines},
  )
  return format_table([*models, *baselines])
