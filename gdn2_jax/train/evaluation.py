"""Held-out loss as the training run asks for it."""

import dataclasses
from typing import Any

from gdn2_jax.eval.perplexity import evaluate_lengths
from gdn2_jax.eval.report import LossReport
from gdn2_jax.train.config import TrainConfig


def evaluate(
  config: TrainConfig, params: Any, dataset: Any, *, multiples: tuple[int, ...]
) -> list[LossReport]:
  """Loss on validation rows of `multiples` times the training length."""
  return evaluate_lengths(
    config.model,
    params,
    dataset,
    seq_len=config.data.seq_len,
    config=dataclasses.replace(config.eval, length_multiples=multiples),
  )


def eval_row(
  reports: list[LossReport], multiples: tuple[int, ...]
) -> dict[str, float]:
  """The numbers of a metrics row: loss_1x, bits_per_byte_1x, ..."""
  row = {}
  for multiple, report in zip(multiples, reports, strict=True):
    row[f"loss_{multiple}x"] = report.nats_per_token
    row[f"bits_per_byte_{multiple}x"] = report.bits_per_byte
  return row


def brief(report: LossReport) -> str:
  """One line of a report."""
  return (
    f"{report.nats_per_token:.4f} nats/token, "
    f"{report.bits_per_byte:.4f} bits/byte"
  )
