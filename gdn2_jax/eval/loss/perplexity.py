"""Held-out loss of a language model, at the training length and beyond."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdn2_jax.config_class import config_class
from gdn2_jax.eval.loss.report import LossReport, PositionLoss, make_report
from gdn2_jax.eval.loss.targets import validation_batches
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.lm import LM
from gdn2_jax.sharding import batch_sharding, shards_of

_FIRST_BUCKET = 32  # positions of the first bucket of the loss by position


@config_class
class EvalConfig:
  """Amount and schedule of the evaluation.

  Attributes:
    every_steps: training steps between evaluations; 0 = only at the end.
    batches: batches of the 1x length that one evaluation scores.
    batch_size: rows per batch at the 1x length.
    length_multiples: row lengths, as multiples of the training length.
  """

  every_steps: int = 0
  batches: int = 16
  batch_size: int = 8
  length_multiples: tuple[int, ...] = (1, 2, 4)


def evaluate_loss(
  config: ModelConfig,
  params: Any,
  dataset: Any,
  *,
  seq_len: int,
  batch_size: int,
  tokens: int | None = None,
  name: str = "model",
  on_batch: Callable[[], object] | None = None,
) -> LossReport:
  """Mean loss over the first `tokens` validation targets that are unmasked.

  Runs on the mesh that `gdn2_jax.sharding.use_mesh` installs, or on one device.
  Losses are float32 per target and summed in float64.
  """
  batches = validation_batches(
    dataset, seq_len=seq_len, batch_size=batch_size, tokens=tokens
  )
  nats_T, count_T = np.zeros(seq_len), np.zeros(seq_len, np.int64)
  for batch in batches:
    nll = _losses(config, params, batch)
    scored = batch["loss_mask"] > 0
    at = batch["positions"][scored]
    nats_T += np.bincount(at, weights=nll[scored], minlength=seq_len)
    count_T += np.bincount(at, minlength=seq_len)
    if on_batch is not None:
      on_batch()
  return make_report(
    name,
    nats=float(nats_T.sum()),
    tokens=int(count_T.sum()),
    seq_len=seq_len,
    bytes_per_token=dataset.validation_bytes_per_token,
    by_position=_by_position(nats_T, count_T),
  )


def evaluate_lengths(
  model_config: ModelConfig,
  params: Any,
  dataset: Any,
  *,
  seq_len: int,
  config: EvalConfig,
  on_batch: Callable[[], object] | None = None,
) -> list[LossReport]:
  """Loss with rows of 1x, 2x, 4x, ... the training length `seq_len`.

  Every length scores the same targets, the first batches * batch_size * seq_len
  of the validation split. Only the context in front of them differs, so a model
  that does not extrapolate shows a higher loss.
  """
  for multiple in config.length_multiples:
    if multiple < 1:
      raise ValueError(
        f"length_multiples={config.length_multiples}: expected numbers >= 1"
      )
  return [
    evaluate_loss(
      model_config,
      params,
      dataset,
      seq_len=multiple * seq_len,
      batch_size=rows_per_batch(config, multiple),
      tokens=scored_tokens(config, seq_len),
      name=f"model {multiple}x ({multiple * seq_len})",
      on_batch=on_batch,
    )
    for multiple in config.length_multiples
  ]


def scored_tokens(config: EvalConfig, seq_len: int) -> int | None:
  """Number of validation tokens that an evaluation scores; None = all."""
  return config.batches * config.batch_size * seq_len or None


def rows_per_batch(config: EvalConfig, multiple: int) -> int:
  """Rows per batch at a length multiple, for as many tokens as at 1x."""
  return max(1, config.batch_size // multiple)


@functools.partial(jax.jit, static_argnames=("config",))
def _token_losses(params, inputs, targets, segment_ids, *, config):
  nll = LM(config).apply(
    {"params": params}, inputs, targets, segment_ids, method="token_losses"
  )
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty:
    # Replicated, because every process reads all losses.
    spec = jax.sharding.PartitionSpec()
    nll = jax.lax.with_sharding_constraint(nll, spec)
  return nll.astype(jnp.float32)


def _losses(config, params, batch) -> np.ndarray:
  """Nats of every target [B, T], masked ones included."""
  rows = len(batch["inputs"])
  mesh = jax.sharding.get_mesh()
  parts = 1 if mesh.empty else shards_of("batch", mesh.shape)
  padding = -rows % parts
  arrays = [
    np.pad(batch[name], ((0, padding), (0, 0)))
    for name in ("inputs", "targets", "segment_ids")
  ]
  # device_put, because the training loop forbids implicit transfers.
  arrays = jax.device_put(arrays, None if mesh.empty else batch_sharding(mesh))
  return jax.device_get(_token_losses(params, *arrays, config=config))[:rows]


def _by_position(nats_T, count_T) -> tuple[PositionLoss, ...]:
  """Splits the loss into positions [0, 32), [32, 64), [64, 128), ..."""
  buckets = []
  start, stop = 0, _FIRST_BUCKET
  while start < len(nats_T):
    stop = min(stop, len(nats_T))
    tokens = int(count_T[start:stop].sum())
    if tokens:
      buckets.append(
        PositionLoss(
          start=start,
          stop=stop,
          nats_per_token=float(nats_T[start:stop].sum()) / tokens,
          tokens=tokens,
        )
      )
    start, stop = stop, 2 * stop
  return tuple(buckets)
