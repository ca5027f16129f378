"""Layers "A": capacity of the cache, tokens over devices, what they cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.model.accounting import (
  count_parameters,
  forward_flops_per_token,
  state_bytes,
)
from gdn2_jax.model.lm import LM, init_cache
from gdn2_jax.sharding import MeshConfig, make_mesh, use_mesh
from tests.model.models import MAX_LENGTH, small_config, small_model, tokens_of
from tests.numerics import rel_rms
from tests.random_params import random_params

FAST = {"xla_backend_optimization_level": 0}


def test_a_token_without_a_slot_is_loud_and_leaves_the_others_alone():
  """Of three pieces of 17 tokens, 40 fit; row 1 reads less of the second."""
  _, _, apply = small_model("A")
  tokens = tokens_of(2, 51)
  want, _ = apply(tokens)
  cache = init_cache(small_config("A"), 2, MAX_LENGTH)
  starts, counts = np.array([0, 0]), np.array([[17, 17], [17, 9], [17, 12]])
  for count in counts:
    piece = np.stack(
      [np.asarray(t)[s : s + 17] for t, s in zip(tokens, starts, strict=True)]
    )
    ids = (np.arange(17)[None] < count[:, None]).astype(np.int32)
    logits, cache = apply(jnp.asarray(piece), jnp.asarray(ids), cache)
    for row, (start, n) in enumerate(zip(starts, count, strict=True)):
      fit = min(n, MAX_LENGTH - start)
      expected = want[row, start : start + fit]
      np.testing.assert_allclose(logits[row, :fit], expected, rtol=0, atol=1e-5)
      assert np.isnan(logits[row, fit:n]).all()
    starts = starts + count
  assert starts.tolist() == [51, 38]
  step = jnp.stack([tokens[0, :1], tokens[1, 38:39]])
  logits, _ = apply(step, None, cache)
  assert np.isnan(logits[0]).all()
  np.testing.assert_allclose(logits[1, 0], want[1, 38], rtol=0, atol=1e-5)


@pytest.mark.parametrize("max_length", [None, 0])
def test_a_cache_without_a_length_is_refused(max_length):
  for pattern in ("A", "GA"):
    with pytest.raises(
      ValueError, match=f"max_length={max_length}: .*'{pattern}'"
    ):
      init_cache(small_config(pattern), 1, max_length)
  shapes = jax.eval_shape(lambda: init_cache(small_config("GS"), 1, max_length))
  assert shapes == jax.eval_shape(lambda: init_cache(small_config("GS"), 1))


def test_tokens_split_over_devices_give_the_same_losses():
  """Two documents, one of them across the border of the shards."""
  config = small_config("A", vocab_size=64)
  params, tokens = random_params(config), tokens_of(2, 33)
  ids = np.ones((2, 32), np.int32)
  ids[0, 10:], ids[1, 30:] = 2, 0

  @functools.partial(jax.jit, compiler_options=FAST)
  def losses(params, tokens, ids):
    args = tokens[:, :-1], tokens[:, 1:], ids
    return LM(config).apply({"params": params}, *args, method="token_losses")

  want = losses(params, tokens, ids)
  with use_mesh(make_mesh(MeshConfig(context=2), jax.devices()[:2])):
    lowered = losses.lower(params, tokens, ids)
    got = losses(params, tokens, ids)
  assert "collective_permute" in lowered.as_text()
  assert rel_rms(got[ids != 0], want[ids != 0]) < 1e-5


def test_costs_grow_with_the_tokens():
  """Keys and values of 2 heads of 8 channels; a query sees all before it."""
  config = small_config("A")
  for length in (MAX_LENGTH, 2 * MAX_LENGTH):
    # Two layers, float32, and each layer's position.
    stored = 2 * (2 * length * 2 * 8 * 4 + 4)
    assert state_bytes(config, length) == {"A": stored}
    seen = np.mean(1 + np.arange(length))
    count = count_parameters(config)
    want = 2 * (count.total - count.embedding) + 2 * 4 * 8 * 4 * seen
    assert forward_flops_per_token(config, length) == pytest.approx(want)
