"""Gradients through the tree of decays of a chunk (README.md section 4).

The second half of intra_grad.py: from the gradients of T, Aqk, E, Qg, Kd and
gamma_C to those of q, k, b and g.
"""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gdn2_jax.pallas import blocks

# Slots of [C, C]; a warpgroup masks dT and dAqk of a level into its own two.
_DT_HI, _DT_LO, _DAQK_HI, _DAQK_LO, _MASKED = range(5)


def through_the_tree(chunk, scores, dE_neg, dQg, dKd, dgamma_C):
  """From the sums over values to dq, dk, db, dg."""

  # dv and dw may still be leaving from slots that are filled next.
  @pl.when(chunk.last)
  def _():
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  chunk.meet()
  # One warpgroup has both sums, of two each has one (_Chunk.scores).
  own = map(jnp.int32, range(2)) if chunk.tiles == 1 else [chunk.wg]
  for n, x in zip(own, scores, strict=True):
    x = jnp.where(blocks.everywhere(n == 0), -x, x)
    blocks.store_split(x, chunk.slot(2 * n), chunk.slot(2 * n + 1))
  dgamma_ref = chunk.s["dgamma_C"].at[chunk.channels]
  dgamma_ref[...] = dgamma_C
  chunk.meet()

  q, k, b = (chunk.load(name) for name in "qkb")
  gamma = blocks.decay(blocks.prefix_span(), *chunk.g_parts())
  suffix = blocks.decay(blocks.suffix_span(), *chunk.g_parts())
  de = -gamma * dE_neg
  dq = gamma * dQg
  dk = suffix * dKd
  dgamma_C = plgpu.load(dgamma_ref, layout=blocks.ROWS.reduce(0))
  gamma_C = blocks.decay(blocks.chunk_span(), *chunk.g_parts())
  dg = gamma_C * blocks.of_columns(dgamma_C)
  dg = _add_dg(chunk, dg, blocks.prefix_span, b * k * de + q * dq)
  dg = _add_dg(chunk, dg, blocks.suffix_span, k * dk)
  de, dq, dk, dg = blocks.loop(
    blocks.LEVELS,
    functools.partial(_level, chunk),
    tuple(blocks.in_rows(x) for x in (de, dq, dk, dg)),
  )
  r, c = blocks.iotas()
  diagonal = sum(
    jnp.where(r == c, blocks.load(chunk.slot(n)).astype(jnp.float32), 0.0)
    for n in (_DAQK_HI, _DAQK_LO)
  ).sum(axis=1)
  diagonal = blocks.of_rows(diagonal)
  q, k, b = (chunk.load(name) for name in "qkb")
  dq += diagonal * k
  dk += diagonal * q + b * de
  return dq * chunk.scale, dk, k * de, dg


def _add_dg(chunk, dg, span, dD):
  """dg + M^T dD: every log-decay gets dD of the sums it is part of."""
  dD_ref = chunk.s["S"].at[chunk.channels]
  dD_ref[...] = dD.astype(dD_ref.dtype)
  plgpu.commit_smem()
  M_T = jnp.where(span(transpose=True), 1.0, 0.0).astype(dD_ref.dtype)
  return blocks.dot(dg, (M_T, dD_ref))


def _level(chunk, n, sums):
  """Adds one level of the tree to de, dq, dk, dg."""
  de, dq, dk, dg = sums
  s = chunk.s
  half = blocks.level_half(n)
  second = (blocks.row_iota() & half) != 0
  x = blocks.decay(blocks.level_span(half), *chunk.g_parts())
  kx = chunk.own("E_neg"), chunk.own("Kd")
  ex, qx = s["S"].at[chunk.channels], s["dS"].at[chunk.channels]
  k = chunk.load("k") * x
  blocks.store_split(jnp.where(second, 0.0, k), *kx)
  ex[...] = jnp.where(second, chunk.load("b") * k, 0.0).astype(ex.dtype)
  qx[...] = jnp.where(second, chunk.load("q") * x, 0.0).astype(qx.dtype)
  r, c = blocks.iotas()
  pairs = blocks.level_pairs(half) & (r > c)

  def masked(slot):
    d = blocks.load(chunk.slot(slot))
    return jnp.where(pairs, d, jnp.zeros_like(d))

  dT, dAqk = (
    (masked(_DT_HI), masked(_DT_LO)),
    (
      masked(_DAQK_HI),
      masked(_DAQK_LO),
    ),
  )
  dT_ref = chunk.slot(_MASKED + 2 * chunk.wg)
  dAqk_ref = chunk.slot(_MASKED + 2 * chunk.wg + 1)
  dT_ref[...], dAqk_ref[...] = dT[0], dAqk[0]
  plgpu.commit_smem()
  dex = blocks.dot(blocks.zeros(), *blocks.split_pairs(dT, kx))
  dex = jnp.where(second, dex * x, 0.0)
  de += dex
  dD = chunk.load("b") * chunk.load("k") * dex
  dqx = blocks.dot(blocks.zeros(), *blocks.split_pairs(dAqk, kx))
  dqx = jnp.where(second, dqx * x, 0.0)
  dq += dqx
  dD += chunk.load("q") * dqx
  dkx = blocks.dot(
    blocks.zeros(),
    (blocks.transposed(dT_ref), ex),
    (blocks.transposed(dAqk_ref), qx),
  )
  dkx = jnp.where(second, 0.0, dkx * x)
  dk += dkx
  dD += chunk.load("k") * dkx
  dg = _add_dg(
    chunk,
    dg,
    lambda transpose: blocks.level_span(half, transpose=transpose),
    dD,
  )
  return tuple(blocks.in_rows(y) for y in (de, dq, dk, dg))
