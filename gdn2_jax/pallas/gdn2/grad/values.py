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

from gdn2_jax.pallas import blocks, projected
from gdn2_jax.pallas.blocks import ROWS, TILE, C
from gdn2_jax.pallas.gdn2.grad import columns
from gdn2_jax.pallas.gdn2.grad.columns import HALF, PART


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
  s = chunk.s
  plgpu.barrier_wait(s["values_loaded"])
  pl.when(chunk.half == 0)(lambda: _recompute_R(chunk))
  pl.when(chunk.half == 1)(lambda: _compute_dX(chunk))
  # All warpgroups read R and dX; v and w, which the second half overwrites,
  # have been read by the first.
  chunk.meet()
  pl.when(chunk.half == 1)(lambda: _write_values(chunk, j))
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
  pairs = [], [], []
  for part in range(2):
    S, dS = (
      blocks.load(_of_state(s[x], part, chunk.K).at[chunk.channels])
      for x in ("S", "dS")
    )

    def of_rows(name, low=0, part=part):
      ref = s[name].at[pl.ds((2 * low + part) * C + chunk.half * HALF, HALF)]
      return blocks.transposed(ref)

    pairs[0].extend((S, of_rows("dX", low)) for low in range(2))
    pairs[1].append((S, of_rows("dO")))
    pairs[2].extend((dS, of_rows("R", low)) for low in range(2))
  sums = zip((dE_neg, dQg, dKd), pairs, strict=True)
  dE_neg, dQg, dKd = map(blocks.in_rows, columns.dots(*sums))
  scores = tuple(
    blocks.in_rows(_add_scores(chunk, x, n))
    for x, n in zip(scores, column_halves(chunk), strict=True)
  )
  return scores, dE_neg, dQg, dKd


def _add_scores(chunk, sum_before, columns_half):
  """Adds dX R^T in the first half of the warpgroups, dO R^T in the second."""
  s, first = chunk.s, chunk.half == 0
  pairs = []
  for part in range(2):

    def of_columns(low, part=part):
      at = (2 * low + part) * C + columns_half * HALF
      return blocks.transposed(s["R"].at[pl.ds(at, HALF)])

    high = blocks.load(_of_part(s["dX"], part))
    dO = blocks.load(_of_part(s["dO"], part))
    is_first = plgpu.broadcasted_iota(jnp.int32, (C, PART), 0, layout=ROWS)
    is_first = is_first < jnp.where(first, C, 0)
    high = jnp.where(is_first, high, dO)
    low = blocks.load(_of_part(s["dX"], part, 1))
    low = jnp.where(is_first, low, jnp.zeros_like(low))
    pairs += blocks.split_pairs((high, low), (of_columns(0), of_columns(1)))
  return blocks.dot(sum_before, *pairs)


def _add_dgamma_C(chunk):
  """Adds S*dS, summed over the 32 value channels that this half adds."""
  dgamma_C = chunk.vector("dgamma_C", chunk.half)
  product = 1.0
  for name in ("S", "dS"):
    ref = _of_state(chunk.s[name], chunk.half, chunk.K).at[chunk.channels]
    product *= blocks.load(ref).astype(jnp.float32)
  sum_before = plgpu.load(dgamma_C, layout=ROWS.reduce(1))
  dgamma_C[...] = sum_before + product.sum(axis=1)


def _recompute_R(chunk):
  """Computes R = A (Z - E S) into the buffer of R, 32 columns at a time."""
  s = chunk.s
  for part in column_halves(chunk):
    R = [_of_part(s["R"], part, low) for low in range(2)]
    S = _of_state(s["S"], part, chunk.K)
    X = blocks.dot(blocks.zeros(C, PART), (s["E_neg"], S))
    X += _load(chunk, "v", part) * _load_w(chunk, part)
    blocks.store_split(X, *R)  # X, until R replaces it
    plgpu.commit_smem()  # wgmma reads X
    X_to_R = blocks.dot(blocks.zeros(C, PART), *((s["A"], x) for x in R))
    blocks.store_split(X_to_R, *R)
  plgpu.commit_smem()  # wgmma reads R


def _compute_dX(chunk):
  """Computes dX = A^T (Aqk^T dO + Kd dS) into the buffer of dX."""
  s = chunk.s
  A_T, Aqk_T = (blocks.transposed(s[name]) for name in ("A", "Aqk"))
  for part in column_halves(chunk):
    dX = [_of_part(s["dX"], part, low) for low in range(2)]
    dS = _of_state(s["dS"], part, chunk.K)
    dO = _of_part(s["dO"], part)
    dR = blocks.dot(blocks.zeros(C, PART), (Aqk_T, dO), (s["Kd"], dS))
    blocks.store_split(dR, *dX)  # dR, until dX replaces it
    plgpu.commit_smem()  # wgmma reads dR
    dR_to_dX = blocks.dot(blocks.zeros(C, PART), *((A_T, x) for x in dX))
    blocks.store_split(dR_to_dX, *dX)
  plgpu.commit_smem()  # wgmma reads dX


def _write_values(chunk, j):
  """Writes dv = w*dX and dw = v*dX through the buffers of v and w."""
  for part in column_halves(chunk):
    refs = [_of_part(chunk.s[name], part) for name in "vw"]
    high, low = (
      blocks.load(_of_part(chunk.s["dX"], part, n)).astype(jnp.float32)
      for n in range(2)
    )
    dX = high + low
    v, w = _load(chunk, "v", part), _load_w(chunk, part)
    dw = v * dX
    if chunk.is_projected:
      dw *= w * (1.0 - w)
    for ref, x in zip(refs, (w * dX, dw), strict=True):
      ref[...] = x.astype(ref.dtype)
    plgpu.commit_smem()  # the TMA stores read dv and dw
    values = pl.ds(j * TILE + part * PART, PART)
    for n, ref in zip((4, 5), refs, strict=True):
      out = chunk.outputs[n].at[(*chunk.tokens, chunk.h, values)]
      plgpu.copy_smem_to_gmem(ref, out)


def _load(chunk, name, part):
  """Loads 32 value channels of v or w."""
  return blocks.load(_of_part(chunk.s[name], part)).astype(jnp.float32)


def _load_w(chunk, part):
  """Loads the write gate of 32 value channels."""
  w = _load(chunk, "w", part)
  return projected.sigmoid(w) if chunk.is_projected else w
