"""Sums over the value channels of a chunk (README.md section 5).

This is the first half of intra_grad.py. For every tile of value channels it
computes R and dX, writes the gradients of v and w, and adds the tile's part of
the gradients of T, Aqk, E, Qg and Kd.
"""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gdn2_jax.pallas import blocks, projected
from gdn2_jax.pallas.blocks import TILE


class Slot:
  """Matrices [C, C] in one buffer, which intra_grad_tree.py reuses."""

  A, AQK, V, W, DO, R_HI, R_LO, DX_HI, DX_LO = range(9)
  COUNT = 9
  # Masks for the decays of E and Kd, until R overwrites them.
  PREFIX, BELOW = R_HI, R_LO


def over_values(chunk):
  """Sums over value tiles; writes dv and dw.

  Returns:
    A tuple of this warpgroup's sums of -dT and dAqk [C, C] (_scores); then -dE,
    dQg and dKd [C, TILE] of its channels. dgamma_C is summed in shared memory.
  """
  tile = blocks.zeros()
  sums = ((blocks.zeros(),) * (3 - chunk.tiles), tile, tile, tile)
  chunk.dgamma_C[...] = plgpu.layout_cast(
    jnp.zeros((TILE,), jnp.float32), blocks.ROWS.reduce(1)
  )

  if chunk.value_tiles > 1:
    return blocks.loop(
      chunk.value_tiles, functools.partial(_value_tile, chunk), sums
    )
  for j in range(chunk.value_tiles):
    sums = _value_tile(chunk, jnp.int32(j), sums)
  return sums


def _scores(chunk):
  """Left operands of this warpgroup's products with R^T, high and low parts.

  -dT = dX R^T and dAqk = dO R^T. A single warpgroup computes both; of two, the
  first computes -dT and the second dAqk, whose operand has a low part of zero.
  """
  dX, dO = (chunk.slot(Slot.DX_HI), chunk.slot(Slot.DX_LO)), chunk.slot(Slot.DO)
  if chunk.tiles == 1:
    return [dX, (dO,)]
  low = blocks.load(dX[1])
  low = jnp.where(blocks.everywhere(chunk.first), low, jnp.zeros_like(low))
  return [(chunk.slot(jnp.where(chunk.first, Slot.DX_HI, Slot.DO)), low)]


def _value_tile(chunk, j, sums):
  """Adds one value tile to the sums of over_values."""
  s = chunk.s
  plgpu.barrier_wait(s["values_loaded"])
  pl.when(chunk.first)(lambda: _recompute_R(chunk))
  pl.when(chunk.last)(lambda: _compute_dX(chunk))
  # All warpgroups read R and dX; v and w, which the last warpgroup overwrites,
  # have been read by the first.
  chunk.meet()
  pl.when(chunk.last)(lambda: _write_values(chunk, j))

  with chunk.recomputed():
    sums = _add_products(chunk, *sums)
  with chunk.recomputed():
    S_dS = blocks.load(chunk.own("S")).astype(jnp.float32)
    S_dS *= blocks.load(chunk.own("dS")).astype(jnp.float32)
    dgamma_C = chunk.dgamma_C
    sum_before = plgpu.load(dgamma_C, layout=blocks.ROWS.reduce(1))
    dgamma_C[...] = sum_before + S_dS.sum(axis=1)
  # All warpgroups have finished with S, dS and the slots, which the next tile
  # or intra_grad_tree.py overwrites; commits their ordinary loads.
  chunk.meet()

  @pl.when(chunk.last & (j + 1 < chunk.value_tiles))
  def _():
    # The TMA stores of dv and dw read the slots of v and w, which are refilled.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    chunk.fetch_values(j + 1)

  return sums


def _add_products(chunk, scores, dE_neg, dQg, dKd):
  """Adds the products of R, dX, dO, S and dS of a value tile."""
  R = chunk.slot(Slot.R_HI), chunk.slot(Slot.R_LO)
  dX = chunk.slot(Slot.DX_HI), chunk.slot(Slot.DX_LO)
  dO = chunk.slot(Slot.DO)
  R_T = tuple(blocks.transposed(x) for x in R)
  scores = tuple(
    blocks.in_rows(blocks.dot(acc, *blocks.split_pairs(d, R_T)))
    for acc, d in zip(scores, _scores(chunk), strict=True)
  )
  S_T, dS_T = (blocks.transposed(chunk.own(x)) for x in ("S", "dS"))
  dE_neg = blocks.in_rows(blocks.dot(dE_neg, (dX[0], S_T), (dX[1], S_T)))
  dQg = blocks.in_rows(blocks.dot(dQg, (dO, S_T)))
  dKd = blocks.dot(dKd, (R[0], dS_T), (R[1], dS_T))
  dE_neg, dQg, dKd = map(blocks.in_rows, (dE_neg, dQg, dKd))
  return tuple(map(blocks.in_rows, scores)), dE_neg, dQg, dKd


def _recompute_R(chunk):
  """Computes R = A (Z - E S) into the slots of R."""
  with chunk.recomputed():
    R = chunk.slot(Slot.R_HI), chunk.slot(Slot.R_LO)
    A = chunk.slot(Slot.A)
    E = [
      tuple(blocks.tile_of(chunk.s[x], n) for x in ("E_neg", "S"))
      for n in range(chunk.tiles)
    ]
    X = blocks.dot(blocks.zeros(), *E)
    # After the products, which leave no registers for v and w.
    v = blocks.load(chunk.slot(Slot.V)).astype(jnp.float32)
    X += v * _load_w(chunk)
    blocks.store_split(X, *R)  # X, until R replaces it
    plgpu.commit_smem()  # wgmma reads X
    X_to_R = blocks.dot(blocks.zeros(), (A, R[0]), (A, R[1]))
    blocks.store_split(X_to_R, *R)
    plgpu.commit_smem()  # wgmma reads R


def _compute_dX(chunk):
  """Computes dX = A^T (Aqk^T dO + Kd dS) into the slots of dX."""
  with chunk.recomputed():
    dX = chunk.slot(Slot.DX_HI), chunk.slot(Slot.DX_LO)
    A_T = blocks.transposed(chunk.slot(Slot.A))
    Aqk_T = blocks.transposed(chunk.slot(Slot.AQK))
    Kd = [
      tuple(blocks.tile_of(chunk.s[x], n) for x in ("Kd", "dS"))
      for n in range(chunk.tiles)
    ]
    dR = blocks.dot(blocks.zeros(), (Aqk_T, chunk.slot(Slot.DO)), *Kd)
    blocks.store_split(dR, *dX)  # dR, until dX replaces it
    plgpu.commit_smem()  # wgmma reads dR
    dR_to_dX = blocks.dot(blocks.zeros(), (A_T, dX[0]), (A_T, dX[1]))
    blocks.store_split(dR_to_dX, *dX)
    plgpu.commit_smem()  # wgmma reads dX


def _write_values(chunk, j):
  """Writes dv = w*dX and dw = v*dX through the slots of v and w."""
  values = pl.ds(j * TILE, TILE)
  # dX is loaded twice to save registers.
  with chunk.recomputed():
    dv = (_load_dX(chunk) * _load_w(chunk)).astype(chunk.slot(Slot.V).dtype)
  with chunk.recomputed():
    dw = _load_dX(chunk) * blocks.load(chunk.slot(Slot.V)).astype(jnp.float32)
    if chunk.is_projected:
      w = _load_w(chunk)
      dw *= w * (1.0 - w)
    chunk.slot(Slot.W)[...] = dw.astype(chunk.slot(Slot.W).dtype)
    chunk.slot(Slot.V)[...] = dv
  plgpu.commit_smem()  # the TMA stores read dv and dw
  for n, slot in ((4, Slot.V), (5, Slot.W)):
    plgpu.copy_smem_to_gmem(
      chunk.slot(slot),
      chunk.outputs[n].at[(*chunk.tokens, chunk.h, values)],
    )


def _load_w(chunk):
  """Loads the write gate of the value tile."""
  w = blocks.load(chunk.slot(Slot.W)).astype(jnp.float32)
  return projected.sigmoid(w) if chunk.is_projected else w


def _load_dX(chunk):
  """Loads dX of the value tile."""
  high, low = (blocks.load(chunk.slot(n)) for n in (Slot.DX_HI, Slot.DX_LO))
  return high.astype(jnp.float32) + low.astype(jnp.float32)
