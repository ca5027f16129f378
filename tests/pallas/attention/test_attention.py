"""The attention kernels in the interpreter, against float64.

Errors are at most twice what rounding the exact result to the dtype costs;
measured 1.0 to 1.5 times. Every run asserts that no race was found.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.ops.attention.api import sliding_window_attention
from tests import numerics
from tests.pallas.gdn2.test_chunk_kernels import (
  CONTRACT,
  error_ratios,
  interpreted,
)

pytestmark = pytest.mark.slow

NAMES = ("o", "dq", "dk", "dv")
# Segments that end inside a block and with one, one of a single token, padding
# between and at the end; 150 tokens are not whole blocks.
IDS = np.repeat(
  np.array([[1, 2, 0, 3, 4, 0]], np.int32), [50, 14, 9, 1, 70, 6], axis=1
)
T = IDS.shape[1]


def with_gradients(run, inputs, do):
  o, pullback = jax.vjp(run, *inputs)
  return (o, *pullback(do.astype(o.dtype)))


def check(rng, *, heads, D, window, packed, dtype, peak=1.0):
  """Outputs and gradients, by the kernels and in float64."""
  query_heads, key_heads = heads
  shapes = (1, T, query_heads, D), *2 * ((1, T, key_heads, D),)
  *inputs, do = (
    np.asarray(jnp.asarray(rng.standard_normal(s), dtype), np.float64)
    for s in (*shapes, shapes[0])
  )
  inputs[0] = np.asarray(jnp.asarray(inputs[0] * peak, dtype), np.float64)
  ids = jnp.asarray(IDS) if packed else None

  def run(implementation, *inputs):
    return sliding_window_attention(
      *inputs,
      window=window,
      q_segment_ids=ids,
      kv_segment_ids=ids,
      implementation=implementation,
    )

  with jax.enable_x64(True):
    exact = with_gradients(
      lambda *inputs: run("xla", *inputs),
      [jnp.asarray(x) for x in inputs],
      jnp.asarray(do),
    )
  inputs, do = [jnp.asarray(x, dtype) for x in inputs], jnp.asarray(do, dtype)
  if packed:
    # What stands at padding enters nothing.
    nowhere = jnp.asarray(IDS == 0)[..., None, None]
    inputs = [jnp.where(nowhere, jnp.nan, x) for x in inputs]
    do = jnp.where(nowhere, jnp.nan, do)

  def kernels(*inputs):
    return run("mosaic_gpu", *inputs)

  actual = interpreted(with_gradients, kernels, inputs, do)
  # Without gradients another function runs.
  np.testing.assert_array_equal(interpreted(kernels, *inputs), actual[0])
  if packed:
    for x in actual:
      assert np.all(np.asarray(x, np.float32)[IDS == 0] == 0)
  exact = {n: np.asarray(x) for n, x in zip(NAMES, exact, strict=True)}
  ratios = error_ratios(dict(zip(NAMES, actual, strict=True)), exact, dtype)
  assert max(ratios.values()) <= CONTRACT, ratios


@pytest.mark.parametrize(
  "case",
  [
    {"heads": (1, 1), "D": 128, "window": 80, "dtype": jnp.bfloat16},
    {"heads": (2, 1), "D": 64, "window": None, "dtype": jnp.float16},
    # One key has nearly all the weight.
    {"heads": (1, 1), "D": 64, "window": 3, "dtype": jnp.bfloat16, "peak": 8},
  ],
  ids=["window", "group", "peaked"],
)
def test_packed_rows(case, rng):
  check(rng, packed=True, **case)


def test_one_segment(rng):
  check(rng, heads=(1, 1), D=64, window=64, packed=False, dtype=jnp.bfloat16)


def test_batch_rows_and_heads_do_not_mix(rng):
  shape = (2, 64, 2, 64)
  q, k, v = (
    jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for _ in range(3)
  )
  ids = jnp.asarray(np.repeat([[1, 2], [3, 3]], 32, axis=1))

  def run(implementation):
    return sliding_window_attention(
      q,
      k,
      v,
      window=40,
      q_segment_ids=ids,
      kv_segment_ids=ids,
      implementation=implementation,
    )

  actual, expected = interpreted(run, "mosaic_gpu"), run("xla")
  bound = 2 * jnp.finfo(jnp.bfloat16).eps
  assert numerics.rel_rms(actual, np.asarray(expected, np.float64)) < bound
