"""Attention over a cache: the same as over all keys at once, in place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.ops.attention.cached import cached_attention
from tests.numerics import rel_rms

N, B, HQ, HKV, S, D = 3, 2, 4, 2, 24, 8
LENGTHS = np.array([5, 17])
LAYER = 1


def draw(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), "float32")


def caches():
  return draw(1, N, B, HKV, S, D), draw(2, N, B, HKV, S, D)


@functools.partial(jax.jit, static_argnames=("window", "block"))
def run(
  q, k, v, k_cache, v_cache, slots, segment_ids=None, window=None, block=None
):
  slot = np.arange(S)[None]
  return cached_attention(
    q,
    k,
    v,
    k_cache,
    v_cache,
    layer=jnp.int32(LAYER),
    held=jnp.asarray(np.where(slot < LENGTHS[:, None], slot, -1)),
    positions=jnp.asarray(LENGTHS[:, None] + np.arange(q.shape[1])),
    slots=slots,
    window=window,
    segment_ids=segment_ids,
    block=block,
  )


def oracle(q, k, v, window=None):
  """One row in float64: queries [T, HQ, D] at the end of keys [S, HKV, D]."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  k, v = (np.repeat(x, HQ // HKV, axis=1) for x in (k, v))
  distance = len(k) - len(q) + np.arange(len(q))[:, None] - np.arange(len(k))
  seen = (distance >= 0) & (distance < (window or len(k)))
  scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(D)
  weights = np.where(seen, np.exp(scores), 0)
  weights /= weights.sum(-1, keepdims=True)
  return np.einsum("hts,shd->thd", weights, v)


# A block that divides S, one that overlaps at its end, and one that is all.
@pytest.mark.parametrize(
  "T,block,window", [(1, 8, 4), (5, 7, None), (5, None, 6)]
)
def test_equals_attention_to_all_keys(T, block, window):
  q, k, v = draw(3, B, T, HQ, D), draw(4, B, T, HKV, D), draw(5, B, T, HKV, D)
  k_cache, v_cache = caches()
  slots = LENGTHS[:, None] + np.arange(T)
  o, new_k, new_v = run(
    q, k, v, k_cache, v_cache, slots, window=window, block=block
  )
  for row, length in enumerate(LENGTHS):
    keys, values = (
      np.concatenate([np.swapaxes(old[LAYER, row, :, :length], 0, 1), new[row]])
      for old, new in ((k_cache, k), (v_cache, v))
    )
    want = oracle(q[row], keys, values, window)
    assert rel_rms(o[row], want) < 1e-6  # measured 2e-7
  for cache, new, after in ((k_cache, k, new_k), (v_cache, v, new_v)):
    want = np.array(cache)
    for row, length in enumerate(LENGTHS):
      want[LAYER, row, :, length : length + T] = np.swapaxes(new[row], 0, 1)
    np.testing.assert_array_equal(after, want)


def test_documents_see_themselves_and_padding_nothing():
  """Row 0 starts anew twice; row 1 is padding but for its first token."""
  T = 5
  q, k, v = draw(3, B, T, HQ, D), draw(4, B, T, HKV, D), draw(5, B, T, HKV, D)
  ids = jnp.array([[1, 2, 2, 0, 3], [1, 0, 0, 0, 0]], jnp.int32)
  nowhere = S + np.arange(T)[None] + np.zeros((B, 1), int)
  k_cache, v_cache = caches()
  o, new_k, new_v = run(q, k, v, k_cache, v_cache, nowhere, ids, block=8)
  np.testing.assert_array_equal(new_k, k_cache)
  np.testing.assert_array_equal(new_v, v_cache)
  np.testing.assert_array_equal(o[np.asarray(ids) == 0], 0)
  for row, length in enumerate(LENGTHS):
    keys, values = (
      np.concatenate(
        [np.swapaxes(old[LAYER, row, :, :length], 0, 1), x[row, :1]]
      )
      for old, x in ((k_cache, k), (v_cache, v))
    )
    assert rel_rms(o[row, :1], oracle(q[row, :1], keys, values)) < 1e-6
  for start, end in ((1, 3), (4, 5)):
    want = oracle(*(x[0, start:end] for x in (q, k, v)))
    np.testing.assert_allclose(o[0, start:end], want, rtol=0, atol=1e-6)


def test_a_donated_cache_is_not_copied():
  """Copying it would dominate a decoding step."""
  size = 4096
  cache = jax.ShapeDtypeStruct((N, B, HKV, size, D), jnp.float32)
  token = jax.ShapeDtypeStruct((B, 1, HQ, D), jnp.float32)
  new = jax.ShapeDtypeStruct((B, 1, HKV, D), jnp.float32)
  numbers = jax.ShapeDtypeStruct((B, 1), jnp.int32)

  @functools.partial(jax.jit, donate_argnums=(3, 4))
  def layers(q, k, v, k_cache, v_cache, positions):
    held = jnp.broadcast_to(jnp.arange(size)[None], (B, size))

    def layer(carry, index):
      q, *cache = carry
      return cached_attention(
        q,
        k,
        v,
        *cache,
        layer=index,
        held=held,
        positions=positions,
        slots=positions,
        window=None,
        block=64,
      ), None

    return jax.lax.scan(layer, (q, k_cache, v_cache), jnp.arange(N))[0]

  compiled = layers.lower(token, new, new, cache, cache, numbers).compile()
  one_cache = N * B * HKV * size * D * 4
  assert compiled.memory_analysis().temp_size_in_bytes < one_cache / 20
