"""Norms and gates of the layer in intra_grad.py: their values and gradients.

See projected.py. q and k stay as they are loaded, and the factors 1 / |q| and
1 / |k| of tokens are on the gradients of the scores, E, Qg and Kd instead
(README.md section 6). So nothing is rounded after the norms.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gdn2_jax.pallas import blocks, inline, projected
from gdn2_jax.pallas.blocks import ROWS, TILE, C
from gdn2_jax.pallas.gdn2.grad import channel_sums, columns
from gdn2_jax.pallas.gdn2.grad.columns import BLOCK, HALF, PART
from gdn2_jax.pallas.gdn2.grad.memory import RAW
from gdn2_jax.pallas.gdn2.grad.products import Operand, dot

_Q, _K = 0, 1
_EXPONENT, _ONE = 0x7F800000, 0x3F800000  # bits of a float32


def log2_decay(chunk, f):
  """Binary logarithm of the decays of this warpgroup's tokens, not masked."""
  rate, bias = (chunk.load_vector("rates", m) for m in range(2))
  return projected.log2_decay(f, rate, bias, ROWS)


def store_norms(chunk):
  """Stores 1 / |q| and 1 / |k| of all tokens."""
  chunk = chunk.recomputed()
  for n, name in enumerate("qk"):

    @pl.when(chunk.turn == (0, 2 * chunk.tiles - 1)[n])
    def _(n=n, name=name):
      # A diagonal is a sum over channels without a sum across warps. Products
      # with padding, which may be NaN, are off the diagonal.
      x = Operand(chunk.s[name], PART)
      square = dot(blocks.zeros(C, C), (x, x.T))
      columns.store_norms(chunk.s["norms"].at[n], square, chunk.s["kinds"])


def take_gate(chunk):
  """Replaces b of this warpgroup's tokens by its gate, to be masked later."""
  b = chunk.erase_scale * projected.sigmoid(chunk.load("b"), ROWS)
  columns.store(chunk.key("b"), b)


def _norm(chunk, n, tokens, axis=0):
  """1 / |q| or 1 / |k|, reduced over an axis of ROWS, as two factors.

  The first, a power of two for the range of float16, is on the numbers in
  shared memory. It is None otherwise.
  """
  ref = chunk.s["norms"].at[n, tokens]
  norm = plgpu.load(ref, layout=ROWS.reduce(axis))
  if not chunk.is_scaled:
    return None, norm
  bits = lax.bitcast_convert_type(norm, jnp.int32)
  power = lax.bitcast_convert_type(bits & _EXPONENT, jnp.float32)
  return power, lax.bitcast_convert_type(bits & ~_EXPONENT | _ONE, jnp.float32)


def scale(chunk):
  """Scales q and k by powers of two, for float16."""
  for n, name in enumerate("qk"):
    x = chunk.load(name)
    power, _ = _norm(chunk, n, chunk.rows)
    columns.store(chunk.key(name), x * blocks.of_columns(power, x.shape))
  inline.sync_warps()


def of_normalised_keys(chunk, *arrays):
  """Factors of the norm of k on arrays [channels, tokens]."""
  _, norm = _norm(chunk, _K, chunk.rows)
  return [x * blocks.of_columns(norm, x.shape) for x in arrays]


def of_stored_keys(chunk, dE_neg, dQg, dKd):
  """Gradients of rows of -e, q and k as in shared memory."""
  if not chunk.is_projected:
    return dE_neg, dQg * chunk.scale, dKd
  dE_neg, dKd = of_normalised_keys(chunk, dE_neg, dKd)
  _, norm = _norm(chunk, _Q, chunk.rows)
  return dE_neg, dQg * blocks.of_columns(norm * chunk.scale, dQg.shape), dKd


def of_stored_scores(chunk, x, is_q, columns_half):
  """The same of scores [C, 32], whose rows are of q or of k; columns of k."""
  factor = jnp.where(is_q, chunk.scale, 1.0)
  if not chunk.is_projected:
    return x * factor
  _, of_rows = _norm(chunk, jnp.where(is_q, _Q, _K), pl.ds(0, C), axis=1)
  _, of_columns = _norm(chunk, _K, pl.ds(columns_half * HALF, HALF))
  x *= blocks.of_rows(of_rows * factor, x.shape)
  return x * blocks.of_columns(of_columns, x.shape)


def fetch_raw(chunk):
  """Starts the loads of b and f as they are before the gates."""
  chunk = chunk.recomputed()

  @pl.when(chunk.first)
  def _():
    for n, name in zip((2, 3), RAW, strict=True):
      source = chunk.inputs[n].at[(*chunk.tokens, chunk.h)]
      plgpu.copy_gmem_to_smem(source, chunk.s[name], chunk.s["raw_loaded"])


def begin(chunk):
  """Sets the sums of the gradients of the rates to zero; waits for b and f."""
  zero = plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), ROWS.reduce(1))
  for m in range(2):
    chunk.vector("drates", 2 * chunk.half + m)[...] = zero
  plgpu.barrier_wait(chunk.s["raw_loaded"])
  chunk.mask(RAW)


def through_gate(chunk, rows, db):
  """Gradient before the sigmoid of b, from that of b."""
  # In float32: 1 - b of a gate rounded to 16 bits may be 0.
  slope = projected.slope_of_sigmoid(chunk.load("raw_b", rows), ROWS)
  return db * (chunk.erase_scale * slope)


def through_decay(chunk, rows, dg):
  """Gradient of f, from that of g; adds to the gradients of the rates."""
  rate, bias = (chunk.load_vector("rates", m, BLOCK) for m in range(2))
  plus, slope = projected.softplus_and_slope(
    chunk.load("raw_f", rows), bias, ROWS
  )
  df = dg * rate * slope
  sums = (dg * plus).sum(axis=1) * projected.LN_2, df.sum(axis=1)
  for m, x in enumerate(sums):
    ref = chunk.vector("drates", 2 * chunk.half + m)
    ref[...] = plgpu.load(ref, layout=ROWS.reduce(1)) + x
  return df


def _along(chunk, n):
  """First row of `along` of block n."""
  return (2 * chunk.half + n) * chunk.tiles


def share_along(chunk, n, *products):
  """Starts sums over all channels, of q dq and of k dk; see through_norms."""
  channel_sums.store(
    chunk.s["along"].at[_along(chunk, n) + chunk.tile], *products
  )
  chunk.arrive()


def through_norms(chunk, n, values, gradients):
  """Gradients before the norms over q and k, from those after them.

  With y = x*r: dx = r*(dy - y (y . dy)). The difference cancels where dy is
  parallel to y, so a y that was rounded to 16 bits is not accurate enough.
  """
  chunk.wait()
  sums = channel_sums.load(
    chunk.s["along"].at[pl.ds(_along(chunk, n), chunk.tiles)]
  )
  results = []
  for m, (x, dx, along) in enumerate(zip(values, gradients, sums, strict=True)):
    power, norm = _norm(chunk, m, chunk.block(n))
    dx -= x * (blocks.of_columns(norm * norm, x.shape) * along)
    if power is not None:
      dx *= blocks.of_columns(power, x.shape)
    results.append(dx)
  return results


def write_rates(chunk):
  """Writes the gradients of the rates, the sum of both halves of the tokens."""

  @pl.when(chunk.half == 1)
  def _():
    for m in range(2):
      parts = [
        plgpu.load(chunk.vector("drates", 2 * n + m), layout=ROWS.reduce(1))
        for n in range(2)
      ]
      out = chunk.outputs[6]
      out = out.at[chunk.row, chunk.h, chunk.c, m, chunk.channels]
      blocks.store_untiled(out, parts[0] + parts[1])
