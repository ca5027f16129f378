"""Sums over the value channels of a chunk (README.md section 5).

This is the first half of intra_grad.py. For every tile of value channels it
computes R and dX, writes the gradients of v and w, and adds the tile's part of
the gradients of T, Aqk, E, Qg and Kd.

Of the two halves of the warpgroups, the first recomputes R while the second
computes dX; then the first sums the gradient of -T and the second that of Aqk.
"""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gdn2_jax.pallas import blocks, inline, projected
from gdn2_jax.pallas.blocks import ROWS, TILE, C
from gdn2_jax.pallas.gdn2.grad.columns import HALF, PART
from gdn2_jax.pallas.gdn2.grad.memory import DO
from gdn2_jax.pallas.gdn2.grad.products import Operand, dot, dots


def over_values(chunk):
  """Sums over value tiles; writes dv and dw.

  Returns:
    A tuple of this warpgroup's sums of d(-T) or dAqk, one or two arrays [C, 32]
    (see `column_halves`); then d(-E), dQg and dKd [channels, tokens].
    dgamma_C is summed in shared memory.
  """
  zeros = blocks.zeros(TILE, HALF)
  sums = ((zeros,) * len(column_halves(chunk)), zeros, zeros, zeros)
  zero = jnp.zeros((TILE,), jnp.float32)
  dgamma_C = chunk.vector("dgamma_C", chunk.half)
  dgamma_C[...] = plgpu.layout_cast(zero, ROWS.reduce(1))
  plgpu.barrier_wait(chunk.s["A_loaded"])
  body = functools.partial(_value_tile, chunk)
  if chunk.value_tiles > 1:
    return blocks.loop(chunk.value_tiles, body, sums)
  return body(jnp.int32(0), sums)


def column_halves(chunk):
  """Numbers of the 32 columns that this warpgroup computes: 0, 1, or both.

  Of scores, and of R or dX.
  """
  return [chunk.tile] if chunk.tiles == 2 else [jnp.int32(0), jnp.int32(1)]


def _of_part(ref, part, low=0):
  """32 value channels of v, w, dO, or of a high or low part of R or dX."""
  return ref.at[pl.ds((2 * low + part) * C, C)]


def _of_state(ref, part, K):
  """32 value channels of S or dS."""
  return ref.at[pl.ds(part * K, K)]


def _value_tile(chunk, j, sums):
  """Adds one value tile to the sums of over_values."""
  chunk, s = chunk.recomputed(), chunk.s
  plgpu.barrier_wait(s["values_loaded"])

  # wgmma of all warpgroups reads R and dX after `meet`. v and w, which the
  # second half overwrites, have then been read by the first.
  @pl.when(chunk.half == 0)
  def _():
    _recompute_R(chunk)
    chunk.meet()

  @pl.when(chunk.half == 1)
  def _():
    gradients = _compute_dX(chunk)
    chunk.meet()
    _write_values(chunk, j, gradients)

  chunk = chunk.recomputed()
  sums = _add_products(chunk, *sums)
  _add_dgamma_C(chunk)

  @pl.when(chunk.half == 1)
  def _():
    # v and w, where dv and dw are, and all else is overwritten after `meet`.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  chunk.meet()

  @pl.when(chunk.last & (j + 1 < chunk.value_tiles))
  def _():
    chunk.fetch_values(j + 1)

  return sums


def _add_products(chunk, scores, dE_neg, dQg, dKd):
  """Adds the products of R, dX, dO, S and dS of a value tile."""
  s = chunk.s
  for part in range(2):
    S, dS = (
      blocks.load(_of_state(s[x], part, chunk.K).at[chunk.channels])
      for x in ("S", "dS")
    )

    def of_rows(name, low=0, part=part):
      at = (2 * low + part) * C + chunk.half * HALF
      return Operand(s[name].at[pl.ds(at, HALF)], PART).T

    dX, R = ([of_rows(x, low) for low in range(2)] for x in ("dX", "R"))
    dE_neg, dQg, dKd = dots(
      (dE_neg, [(S, x) for x in dX]),
      (dQg, [(S, of_rows("dX", DO))]),
      (dKd, [(dS, x) for x in R]),
    )
  scores = dots(
    *(
      (x, _score_products(chunk, n))
      for x, n in zip(scores, column_halves(chunk), strict=True)
    )
  )
  sums = map(blocks.in_rows, (dE_neg, dQg, dKd))
  return (tuple(map(blocks.in_rows, scores)), *sums)


def _score_products(chunk, columns_half):
  """dX R^T in the first half of the warpgroups, dO R^T in the second."""
  s = chunk.s
  pairs = []
  for part in range(2):

    def of_columns(low, part=part):
      at = (2 * low + part) * C + columns_half * HALF
      return Operand(s["R"].at[pl.ds(at, HALF)], PART).T

    first = chunk.half == 0
    at = part + jnp.where(first, 0, 2 * DO)
    rows = Operand(s["dX"].at[pl.ds(at * C, C)], PART)
    low_rows = blocks.load(_of_part(s["dX"], part, 1))
    is_first = plgpu.broadcasted_iota(jnp.int32, (C, PART), 0, layout=ROWS)
    is_first = is_first < jnp.where(first, C, 0)
    low_rows = jnp.where(is_first, low_rows, jnp.zeros_like(low_rows))
    low, high = of_columns(1), of_columns(0)
    pairs += [(rows, high), (rows, low), (low_rows, high)]
  return pairs


def _add_dgamma_C(chunk):
  """Adds S*dS, summed over the 32 value channels that this half adds."""
  dgamma_C = chunk.vector("dgamma_C", chunk.half)
  product = 1.0
  for name in ("S", "dS"):
    ref = _of_state(chunk.s[name], chunk.half, chunk.K).at[chunk.channels]
    product *= inline.widen(blocks.load(ref))
  sum_before = plgpu.load(dgamma_C, layout=ROWS.reduce(1))
  dgamma_C[...] = sum_before + product.sum(axis=1)


def _recompute_R(chunk):
  """Computes R = A (Z - E S) into the buffer of R, 32 columns at a time."""
  s = chunk.s
  A, E_neg = (Operand(s[name], PART) for name in ("A", "E_neg"))
  for part in column_halves(chunk):
    R = [_of_part(s["R"], part, low) for low in range(2)]
    S = Operand(_of_state(s["S"], part, chunk.K), PART)
    # While the other half of the warpgroups multiplies.
    Z = blocks.in_rows(_load(chunk, "v", part) * _load_w(chunk, part))
    # X, until R replaces it
    blocks.store_split(dot(Z, (E_neg, S)), *R)
    plgpu.commit_smem()  # wgmma reads X
    product = dot(blocks.zeros(C, PART), *[(A, Operand(x, PART)) for x in R])
    inline.sync_warps()  # the products of all four warps have read X
    blocks.store_split(product, *R)


def _compute_dX(chunk):
  """Computes dX = A^T (Aqk^T dO + Kd dS) into the buffer of dX.

  Returns:
    For each of `column_halves`, dv = w*dX and dw = v*dX, 16-bit [C, 32].
  """
  s, gradients = chunk.s, []
  A, Aqk, Kd = (Operand(s[name], PART) for name in ("A", "Aqk", "Kd"))
  for part in column_halves(chunk):
    dX = [_of_part(s["dX"], part, low) for low in range(2)]
    dS = Operand(_of_state(s["dS"], part, chunk.K), PART)
    dO = Operand(_of_part(s["dX"], part, DO), PART)
    pairs = [(Aqk.T, dO), (Kd, dS)]
    if "Kd_low" in s:
      pairs.append((Operand(s["Kd_low"], PART), dS))
    dR = dot(blocks.zeros(C, PART), *pairs)
    blocks.store_split(dR, *dX)  # dR, until dX replaces it
    plgpu.commit_smem()  # wgmma reads dR
    product = dot(blocks.zeros(C, PART), *[(A.T, Operand(x, PART)) for x in dX])
    inline.sync_warps()  # the products of all four warps have read dR
    blocks.store_split(product, *dX)
    w = _load(chunk, "w", part)
    dw = _load(chunk, "v", part) * product
    if chunk.is_projected:
      w, slope = projected.sigmoid_and_slope(w, ROWS)
      dw *= slope
    gradients.append([x.astype(s["v"].dtype) for x in (w * product, dw)])
  return gradients


def _write_values(chunk, j, gradients):
  """Writes dv and dw through the buffers of w and v."""
  for part, (dv, dw) in zip(column_halves(chunk), gradients, strict=True):
    over_v, over_w = (_of_part(chunk.s[name], part) for name in "vw")
    over_v[...], over_w[...] = dw, dv
    plgpu.commit_smem()  # the TMA stores read dv and dw
    values = pl.ds(j * TILE + part * PART, PART)
    for n, ref in ((4, over_w), (5, over_v)):
      out = chunk.outputs[n].at[(*chunk.tokens, chunk.h, values)]
      plgpu.copy_smem_to_gmem(ref, out)


def _load(chunk, name, part):
  """Loads 32 value channels of v or w."""
  return inline.widen(blocks.load(_of_part(chunk.s[name], part)))


def _load_w(chunk, part):
  """Loads the write gate of 32 value channels."""
  w = _load(chunk, "w", part)
  return projected.sigmoid(w, ROWS) if chunk.is_projected else w
