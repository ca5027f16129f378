"""Validation loss against NumPy, at several lengths and on a mesh."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.eval.loss.perplexity import (
  EvalConfig,
  evaluate_lengths,
  evaluate_loss,
)
from gdn2_jax.eval.loss.report import (
  format_positions,
  format_table,
  make_report,
)
from gdn2_jax.eval.loss.targets import num_batches, validation_batches
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.lm import LM
from gdn2_jax.model.mixers.attention import AttentionConfig
from gdn2_jax.model.mixers.gdn2 import GDN2Config
from gdn2_jax.sharding import MeshConfig, make_mesh, shardings_of, use_mesh
from tests.random_params import random_params

CONFIG = ModelConfig(
  vocab_size=30,
  model_dim=32,
  num_layers=2,
  pattern="GS",
  gdn2=GDN2Config(
    num_heads=2, key_dim=16, value_dim=16, implementation="reference"
  ),
  attention=AttentionConfig(num_heads=2, head_dim=16, window=8),
  mlp_dim=48,
  dtype="float32",
)
# Two float32 programs for one loss of about 4 nats: measured 2e-7 relative.
RTOL = 2e-6


@functools.cache
def parameters():
  return random_params(CONFIG)


def numpy_loss(dataset, seq_len, batch_size):
  """Sum of nats and count from the logits of one batch after the other."""

  @jax.jit
  def forward(params, tokens, segment_ids):
    return LM(CONFIG).apply({"params": params}, tokens, segment_ids)[0]

  nats, count = 0.0, 0
  for batch in dataset.validation_batches(seq_len, batch_size):
    logits = forward(parameters(), batch["inputs"], batch["segment_ids"])
    logits = np.asarray(logits, np.float64)
    top = logits.max(axis=-1, keepdims=True)
    log_z = np.log(np.exp(logits - top).sum(axis=-1)) + top[..., 0]
    target = np.take_along_axis(logits, batch["targets"][..., None], axis=-1)
    mask = batch["loss_mask"]
    nats += ((log_z - target[..., 0]) * mask).sum()
    count += int(mask.sum())
  return nats, count


def test_the_loss_is_the_token_weighted_mean(dataset):
  nats, count = numpy_loss(dataset, seq_len=16, batch_size=4)
  seen = []
  report = evaluate_loss(
    CONFIG,
    parameters(),
    dataset,
    seq_len=16,
    batch_size=4,
    on_batch=lambda: seen.append(1),
  )
  assert report.tokens == count
  np.testing.assert_allclose(report.nats_per_token, nats / count, rtol=RTOL)
  np.testing.assert_allclose(
    report.bits_per_byte, nats / count / math.log(2) / 3.2, rtol=RTOL
  )
  np.testing.assert_allclose(
    report.perplexity, math.exp(nats / count), rtol=10 * RTOL
  )
  assert len(seen) == num_batches(dataset, seq_len=16, batch_size=4)


def test_positions_split_the_loss(dataset):
  report = evaluate_loss(
    CONFIG, parameters(), dataset, seq_len=64, batch_size=1
  )
  buckets = report.by_position
  assert [(b.start, b.stop) for b in buckets] == [(0, 32), (32, 64)]
  assert sum(b.tokens for b in buckets) == report.tokens
  mean = sum(b.tokens * b.nats_per_token for b in buckets) / report.tokens
  np.testing.assert_allclose(mean, report.nats_per_token, rtol=1e-12)
  late = 0
  for batch in dataset.validation_batches(64, 1):
    late += int(((batch["positions"] >= 32) * batch["loss_mask"]).sum())
  assert buckets[1].tokens == late
  text = format_positions(report)
  assert "0-31" in text and f"{late:,}" in text


@pytest.mark.slow
def test_every_length_scores_the_same_targets(dataset):
  """5 rows of 16 tokens: at 4x that is a row and a quarter."""
  config = EvalConfig(batches=5, batch_size=1, length_multiples=(1, 2, 4))
  reports = evaluate_lengths(
    CONFIG, parameters(), dataset, seq_len=16, config=config
  )
  tokens = dataset.validation_tokens()
  scored = np.count_nonzero(tokens[:80] != 0)
  assert [r.tokens for r in reports] == [scored] * 3
  assert [r.seq_len for r in reports] == [16, 32, 64]
  assert reports[2].name == "model 4x (64)"
  assert len({r.nats_per_token for r in reports}) == 3

  for seq_len in (16, 32, 64):
    targets = [
      batch["targets"][batch["loss_mask"] > 0]
      for batch in validation_batches(
        dataset, seq_len=seq_len, batch_size=2, tokens=80
      )
    ]
    np.testing.assert_array_equal(
      np.concatenate(targets), tokens[1:81][tokens[:80] != 0]
    )


@pytest.mark.slow
def test_the_mesh_does_not_change_the_loss(dataset):
  """Three rows on four shards of the batch: the fourth is padding."""
  one = evaluate_loss(
    CONFIG, parameters(), dataset, seq_len=16, batch_size=3, tokens=96
  )
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  boxed = jax.eval_shape(
    LM(CONFIG).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)
  )["params"]
  with use_mesh(mesh):
    params = jax.device_put(parameters(), shardings_of(boxed, mesh))
    assert not params["head"].sharding.is_fully_replicated
    many = evaluate_loss(
      CONFIG, params, dataset, seq_len=16, batch_size=3, tokens=96
    )
  assert many.tokens == one.tokens
  np.testing.assert_allclose(many.nats_per_token, one.nats_per_token, rtol=RTOL)


def test_no_implicit_transfer(dataset):
  evaluate = functools.partial(
    evaluate_loss, CONFIG, parameters(), dataset, seq_len=16, batch_size=4
  )
  want = evaluate()
  with jax.transfer_guard("disallow"):
    assert evaluate() == want


def test_nothing_to_score_is_an_error(dataset):
  for change, message in [
    ({"tokens": 0}, "tokens=0"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"seq_len": 0}, "seq_len=0"),
  ]:
    sizes = {"seq_len": 16, "batch_size": 4} | change
    with pytest.raises(ValueError, match=message):
      evaluate_loss(CONFIG, parameters(), dataset, **sizes)
  with pytest.raises(ValueError, match="length_multiples"):
    evaluate_lengths(
      CONFIG,
      parameters(),
      dataset,
      seq_len=16,
      config=EvalConfig(length_multiples=(1, 0)),
    )
  with pytest.raises(ValueError, match="no target"):
    make_report("model", nats=0.0, tokens=0, seq_len=8, bytes_per_token=3.0)
  with pytest.raises(ValueError, match="bytes_per_token"):
    make_report("model", nats=1.0, tokens=1, seq_len=8, bytes_per_token=0.0)


def test_the_table_lines_up():
  reports = [
    make_report(name, nats=nats, tokens=1000, seq_len=8, bytes_per_token=2.0)
    for name, nats in [("model 1x (8)", 2345.6), ("unigram", 7e6)]
  ]
  lines = format_table(reports).splitlines()
  assert lines[0].split() == ["nats/token", "bits/byte", "perplexity", "tokens"]
  assert lines[2].split()[-4:] == ["2.3456", "1.6920", "10.44", "1,000"]
  assert lines[3].split()[-2:] == ["inf", "1,000"]
  assert len({len(line) for line in lines}) == 1
  assert reports[0].to_json()["perplexity"] == reports[0].perplexity
