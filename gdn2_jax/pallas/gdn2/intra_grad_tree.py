"""Gradients through the tree of decays of a chunk (README.md section 5).

This is the second half of intra_grad.py: from the gradients of T, Aqk, E, Qg,
Kd and gamma_C to those of q, k, b and g. Three loops over the levels of the
tree compute the parts of b*k, q and k, because one loop for all three needs too
many registers. Meanwhile dq and dk are kept in shared memory ("parked").
"""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gdn2_jax.pallas import blocks

# Slots of [C, C]: dT and dAqk, high and low parts; then two per warpgroup.
_DT, _DAQK, _OWN = 0, 2, 4


def through_the_tree(chunk, scores, dE_neg, dQg, dKd):
  """Writes dq, dk, db and dg, given the sums over the value channels."""
  with chunk.recomputed():
    _share_scores(chunk, scores)
  for x, parked in ((dKd, _parked_dk), (dQg, _parked_dq)):
    with chunk.recomputed():
      blocks.store_split(x, *parked(chunk))

  def load_e():
    return chunk.load("b") * chunk.load("k")

  with chunk.recomputed():
    de = -dE_neg * blocks.decay(blocks.prefix_span(), *chunk.g_parts())
    dg = _dg_of_chunk(chunk)
  with chunk.recomputed():
    dg = _add_dg(chunk, dg, blocks.prefix_span, load_e() * de)
  de, dg = _walk(chunk, functools.partial(_later, load_e, _DT), de, dg)
  with chunk.recomputed():
    chunk.write_key(2, chunk.load("k") * de, chunk.own("Kd"))
    dk = _load_split(_parked_dk(chunk))
    dk *= blocks.decay(blocks.suffix_span(), *chunk.g_parts())
    dg = _add_dg(chunk, dg, blocks.suffix_span, chunk.load("k") * dk)
    blocks.store_split(dk + chunk.load("b") * de, *_parked_dk(chunk))

  load_q = functools.partial(chunk.load, "q")
  with chunk.recomputed():
    dq = _load_split(_parked_dq(chunk))
    dq *= blocks.decay(blocks.prefix_span(), *chunk.g_parts())
    dg = _add_dg(chunk, dg, blocks.prefix_span, load_q() * dq)
  # db was stored from the buffer that _later fills with the low part of k*x.
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  dq, dg = _walk(chunk, functools.partial(_later, load_q, _DAQK), dq, dg)
  with chunk.recomputed():
    dq += _diagonal(chunk) * chunk.load("k")
    chunk.write_key(0, dq * chunk.scale, chunk.own("Kd"))

  with chunk.recomputed():
    dk = _load_split(_parked_dk(chunk))
  dk, dg = _walk(chunk, _earlier, dk, dg)
  with chunk.recomputed():
    dk += _diagonal(chunk) * chunk.load("q")
    chunk.write_key(1, dk, chunk.own("k"))
    chunk.write_dg(dg)


def _parked_dk(chunk):
  """Buffers that keep dk, high and low part; later the masked scores."""
  return tuple(chunk.slot(_OWN + 2 * chunk.wg + n) for n in range(2))


def _parked_dq(chunk):
  """Buffers that keep dq, high and low part."""
  return chunk.own("S"), chunk.own("dS")


def _share_scores(chunk, scores):
  """Stores dT and dAqk for all warpgroups."""

  # TMA stores of dv and dw, which the last warpgroup started, may still read
  # the slots that dT and dAqk overwrite. `meet` makes the first one wait, too.
  @pl.when(chunk.last)
  def _():
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  chunk.meet()
  # One warpgroup has both sums; of two, each has one (see
  # intra_grad_values._scores).
  own = map(jnp.int32, range(2)) if chunk.tiles == 1 else [chunk.wg]
  for n, x in zip(own, scores, strict=True):
    x = jnp.where(blocks.everywhere(n == 0), -x, x)
    blocks.store_split(x, chunk.slot(2 * n), chunk.slot(2 * n + 1))
  chunk.meet()  # each warpgroup reads both dT and dAqk


def _dg_of_chunk(chunk):
  """Contribution of the decay of the whole chunk to dg [C, TILE]."""
  dgamma_C = plgpu.load(chunk.dgamma_C, layout=blocks.ROWS.reduce(0))
  gamma_C = blocks.decay(blocks.chunk_span(), *chunk.g_parts())
  return blocks.in_rows(gamma_C * blocks.of_columns(dgamma_C))


def _load_split(refs):
  return sum(blocks.load(ref).astype(jnp.float32) for ref in refs)


def _add_dg(chunk, dg, span, dD):
  """dg + M^T dD: adds to every log-decay the dD of the sums that include it."""
  dD_ref = chunk.own("E_neg")  # the products with k*x, stored here, are done
  dD_ref[...] = dD.astype(dD_ref.dtype)
  plgpu.commit_smem()  # wgmma reads dD
  M_T = jnp.where(span(transpose=True), 1.0, 0.0).astype(dD_ref.dtype)
  return blocks.dot(dg, (M_T, dD_ref))


def _walk(chunk, level, *sums):
  """Adds all levels of the tree to the sums."""

  def body(n, sums):
    sums = level(chunk, blocks.level_half(n), *sums)
    return tuple(map(blocks.in_rows, sums))

  return blocks.loop(blocks.LEVELS, body, tuple(map(blocks.in_rows, sums)))


def _masked(half, ref):
  """Loads the scores of one level, strictly below the diagonal."""
  r, c = blocks.iotas()
  d = blocks.load(ref)
  keep = blocks.level_pairs(half) & (r > c)
  return jnp.where(keep, d, jnp.zeros_like(d))


def _level_span(half):
  return functools.partial(blocks.level_span, half)


def _later(load_y, slot, chunk, half, dy, dg):
  """Adds a level's dy and dg for y = b*k or q, in rows of second halves."""
  with chunk.recomputed():
    kx = chunk.own("E_neg"), chunk.own("Kd")
    x = blocks.decay(blocks.level_span(half), *chunk.g_parts())
    second = (blocks.row_iota() & half) != 0
    blocks.store_split(jnp.where(second, 0.0, chunk.load("k") * x), *kx)
  plgpu.commit_smem()  # wgmma reads k*x
  with chunk.recomputed():
    kx = chunk.own("E_neg"), chunk.own("Kd")
    high = _masked(half, chunk.slot(slot))
    dyx = blocks.dot(blocks.zeros(), (high, kx[0]), (high, kx[1]))
  with chunk.recomputed():
    low = _masked(half, chunk.slot(slot + 1))
    dyx = blocks.dot(dyx, (low, chunk.own("E_neg")))
    second = (blocks.row_iota() & half) != 0
    dyx = jnp.where(second, dyx * x, 0.0)
  with chunk.recomputed():
    dg = _add_dg(chunk, dg, _level_span(half), load_y() * dyx)
  return dy + dyx, dg


def _earlier(chunk, half, dk, dg):
  """Adds a level's dk and dg, in rows of first halves."""
  with chunk.recomputed():
    ex = chunk.own("S")  # dq, kept here and in dS, was loaded before
    x = blocks.decay(blocks.level_span(half), *chunk.g_parts())
    second = (blocks.row_iota() & half) != 0
    e = chunk.load("b") * chunk.load("k")
    ex[...] = jnp.where(second, e * x, 0.0).astype(ex.dtype)
  with chunk.recomputed():
    qx = chunk.own("dS")
    second = (blocks.row_iota() & half) != 0
    qx[...] = jnp.where(second, chunk.load("q") * x, 0.0).astype(qx.dtype)
  for n, slot in enumerate((_DT, _DAQK)):
    with chunk.recomputed():
      _parked_dk(chunk)[n][...] = _masked(half, chunk.slot(slot))
  plgpu.commit_smem()  # wgmma reads e*x, q*x and the masked scores
  with chunk.recomputed():
    ex, qx = chunk.own("S"), chunk.own("dS")
    dT_T, dAqk_T = map(blocks.transposed, _parked_dk(chunk))
    dkx = blocks.dot(blocks.zeros(), (dT_T, ex), (dAqk_T, qx))
    second = (blocks.row_iota() & half) != 0
    dkx = jnp.where(second, 0.0, dkx * x)
  with chunk.recomputed():
    dg = _add_dg(chunk, dg, _level_span(half), chunk.load("k") * dkx)
  return dk + dkx, dg


def _diagonal(chunk):
  """Diagonal of dAqk, one number per row, as a [C, TILE] tile."""
  r, c = blocks.iotas()
  dAqk = _load_split((chunk.slot(_DAQK), chunk.slot(_DAQK + 1)))
  return blocks.of_rows(jnp.where(r == c, dAqk, 0.0).sum(axis=1))
