"""Kernels of the short convolution and the gated norm, in the interpreter.

Against float64 on the same rounded inputs: errors at most twice what rounding
the exact result to the dtype costs; sums in float32 as float32. Every run
asserts that no race was found.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.ops.norm import gated_rms_norm
from gdn2_jax.ops.short_conv import short_conv
from tests import numerics
from tests.ops.test_norm import gated_oracle
from tests.pallas.gdn2.test_chunk_kernels import (
  CONTRACT,
  error_ratios,
  interpreted,
)

pytestmark = pytest.mark.slow

# A segment that ends in its block, one that begins as the next block does, one
# of two tokens, padding inside and at the end.
IDS = np.repeat(
  np.array([[1, 2, 3, 0, 4, 5, 0]], np.int32), [3, 61, 2, 2, 3, 3, 2], axis=1
)


def draw(rng, dtype, *shapes):
  """Arrays rounded to dtype, as float64."""
  arrays = (jnp.asarray(rng.standard_normal(s), dtype) for s in shapes)
  return [np.asarray(x).astype(np.float64) for x in arrays]


def with_gradients(run, inputs, dy):
  y, pullback = jax.vjp(run, *inputs)
  return (y, *pullback(dy.astype(y.dtype)))


@pytest.mark.parametrize(
  ("V", "dtype", "activation"),
  [
    (128, jnp.bfloat16, "silu"),
    (64, jnp.float16, "sigmoid"),
    (256, jnp.bfloat16, "sigmoid"),
  ],
)
def test_gated_norm(V, dtype, activation, rng):
  shape = (2, 70, 2, V)  # not whole blocks
  x, gate, dy = draw(rng, dtype, *3 * (shape,))
  x[0, 5:9] *= 30
  x[1, 3] = 0
  gate[0, ::7] *= 30  # exp would overflow
  x, gate = (np.asarray(jnp.asarray(a, dtype), np.float64) for a in (x, gate))
  weight = 1 + 0.3 * rng.standard_normal(V).astype(np.float32)
  bias = rng.standard_normal((2, V)).astype(np.float32)
  y, grads = gated_oracle(x, gate + bias, weight, dy, activation, 1e-5)
  names = ("y", "dx", "dgate", "dweight", "dbias")
  exact = dict(zip(names, (y, *grads, grads[1].sum((0, 1))), strict=True))

  def run(x, gate, weight, bias):
    return gated_rms_norm(
      x,
      gate,
      weight,
      bias=bias,
      activation=activation,
      implementation="mosaic_gpu",
    )

  inputs = [jnp.asarray(a, dtype) for a in (x, gate)]
  inputs += [jnp.asarray(a) for a in (weight, bias)]
  dy = jnp.asarray(dy, dtype)
  outputs = interpreted(with_gradients, run, inputs, dy)
  # Without gradients another function runs.
  np.testing.assert_array_equal(interpreted(run, *inputs), outputs[0])
  actual = dict(zip(names, outputs, strict=True))
  for name in ("dweight", "dbias"):
    error = numerics.rel_rms(actual.pop(name), exact.pop(name))
    assert error < numerics.FLOAT32_BOUND, name
  ratios = error_ratios(actual, exact, dtype)
  assert max(ratios.values()) <= CONTRACT, ratios


@pytest.mark.parametrize(
  ("C", "W", "dtype", "packed"),
  [
    (128, 4, jnp.bfloat16, False),
    (144, 4, jnp.float16, True),  # padded to whole blocks of channels
    (256, 2, jnp.bfloat16, True),
  ],
)
def test_short_conv(C, W, dtype, packed, rng):
  T = IDS.shape[1]
  shapes = (1, T, C), (W, C), (1, W - 1, C), (1, T, C)
  *inputs, dy = draw(rng, dtype, *shapes)
  ids = jnp.asarray(IDS) if packed else None

  def run(implementation, *inputs):
    x, kernel, state = inputs
    return short_conv(
      x,
      kernel,
      activation="silu",
      segment_ids=ids,
      state=state,
      implementation=implementation,
    )

  with jax.enable_x64(True):
    exact = with_gradients(
      lambda *inputs: run("xla", *inputs)[0],
      [jnp.asarray(x) for x in inputs],
      jnp.asarray(dy),
    )
  inputs = [jnp.asarray(x, dtype) for x in inputs]
  dy = jnp.asarray(dy, dtype)
  if packed:
    # What stands at padding enters nothing.
    nowhere = jnp.asarray(IDS == 0)[..., None]
    inputs[0] = jnp.where(nowhere, jnp.nan, inputs[0])
    dy = jnp.where(nowhere, jnp.nan, dy)

  def kernels(*inputs):
    return run("mosaic_gpu", *inputs)[0]

  actual = interpreted(with_gradients, kernels, inputs, dy)
  last = interpreted(run, "mosaic_gpu", *inputs)
  for a, b in zip(last, (actual[0], run("xla", *inputs)[1]), strict=True):
    np.testing.assert_array_equal(a, b)
  names = ("y", "dx", "dkernel", "dstate")
  exact = {n: np.asarray(x) for n, x in zip(names, exact, strict=True)}
  ratios = error_ratios(dict(zip(names, actual, strict=True)), exact, dtype)
  assert max(ratios.values()) <= CONTRACT, ratios
