"""Norms and gates of the layer in intra_grad.py: their values and gradients.

See projected.py. A sum over tokens stays within four lanes; one over channels
would pass from warp to warp, and is the diagonal of a matrix product instead.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gdn2_jax.pallas import blocks, projected
from gdn2_jax.pallas.blocks import ROWS, TILE, C
from gdn2_jax.pallas.gdn2.grad import columns
from gdn2_jax.pallas.gdn2.grad.columns import BLOCK, HALF, PART
from gdn2_jax.pallas.gdn2.grad.memory import DQ, RAW
from gdn2_jax.pallas.gdn2.grad.products import Operand, dot


def log_decay(chunk, f):
  """g of this warpgroup's channels and tokens, not masked."""
  x = chunk.at_tokens(f) + chunk.load_vector("rates", 1)
  return chunk.load_vector("rates", 0) * projected.softplus(x)


def take_inputs(chunk):
  """Replaces q, k and b by what the norms and the gate make of them."""
  chunk = chunk.recomputed()
  inputs = [Operand(chunk.s[name], PART) for name in "qk"]
  _sum_over_channels(chunk, "squares", [[(x, x.T)] for x in inputs])

  def load(name):
    x = chunk.at_tokens(columns.load(chunk.key(name)))
    return x.astype(jnp.float32)

  b = chunk.erase_scale * projected.sigmoid(load("b"))
  columns.store(chunk.key("b"), b)
  for n, name in enumerate("qk"):
    columns.store(chunk.key(name), load(name) * _norm(chunk, n))


def _sum_over_channels(chunk, name, products):
  """Stores diagonals of matrix products [tokens, tokens], zero at padding.

  A diagonal is a sum over channels without a sum across warps. One warpgroup
  has the first sum and another the second; all have seen both on return.
  """
  for n, pairs in enumerate(products):

    @pl.when(chunk.turn == (0, 2 * chunk.tiles - 1)[n])
    def _(n=n, pairs=pairs):
      x = dot(blocks.zeros(C, C), *pairs)
      # Products with padding, which may be NaN, are off the diagonal.
      columns.store_diagonal(chunk.s[name].at[n], x, chunk.s["kinds"])

  chunk.meet()


def _load_sum(chunk, name, n):
  """Sum n of _sum_over_channels as an array [channels, tokens]."""
  x = plgpu.load(chunk.s[name].at[n, chunk.rows], layout=ROWS.reduce(0))
  return blocks.of_columns(x, (TILE, HALF))


def _norm(chunk, n):
  return lax.rsqrt(_load_sum(chunk, "squares", n) + projected.EPS)


def begin(chunk):
  """Sets the sums of the gradients of the rates to zero."""
  zero = plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), ROWS.reduce(1))
  for m in range(2):
    chunk.vector("drates", 2 * chunk.half + m)[...] = zero


def through_gate(chunk, block, db):
  """Gradient before the sigmoid of b, from that of b."""
  # Recomputed in float32: 1 - b of a gate rounded to 16 bits may be 0.
  b = projected.sigmoid(chunk.load_raw(2, block))
  return db * (chunk.erase_scale * b * (1.0 - b))


def through_decay(chunk, block, dg):
  """Gradient of f, from that of g; adds to the gradients of the rates."""
  rate, bias = (chunk.load_vector("rates", m, BLOCK) for m in range(2))
  f = chunk.load_raw(3, block) + bias
  df = dg * rate * projected.sigmoid(f)
  for m, x in enumerate((dg * projected.softplus(f), df)):
    ref = chunk.vector("drates", 2 * chunk.half + m)
    ref[...] = plgpu.load(ref, layout=ROWS.reduce(1)) + x.sum(axis=1)
  return df


def _saved_dq(chunk, rows):
  return chunk.s["a"].at[chunk.channels, rows]  # a is not used again


def save(chunk, block, dq, dk):
  """Keeps the gradients after the norms of 16 tokens, for `finish`."""
  rows = chunk.block(block)
  _saved_dq(chunk, rows)[...] = dq
  # High and low part of dk in the place of q and k, which are not used again.
  for name, x in zip("qk", blocks.split(dk, chunk.s["q"].dtype), strict=True):
    columns.store(chunk.key(name, rows), x)


def finish(chunk):
  """Gradients before the norms over q and k; writes those of the rates.

  With y = x*r: dx = r*(dy - y (y . dy)). The difference cancels where dy is
  parallel to y, so a y that was rounded to 16 bits is not accurate enough.
  """
  chunk = chunk.recomputed()
  s = chunk.s
  chunk.meet()  # the buffers of the levels are free

  @pl.when(chunk.first)
  def _():
    for n, name in enumerate(RAW):
      source = chunk.inputs[n].at[(*chunk.tokens, chunk.h)]
      plgpu.copy_gmem_to_smem(source, s[name], s["raw_loaded"])

  dq = plgpu.layout_cast(blocks.load(_saved_dq(chunk, chunk.rows)), ROWS)
  for name, x in zip(DQ, blocks.split(dq, s["q"].dtype), strict=True):
    columns.store(chunk.key(name), x)
  plgpu.barrier_wait(s["raw_loaded"])
  chunk.meet()  # all parts of dq are there, and committed
  raw = [Operand(s[name], PART) for name in RAW]
  parts = [[Operand(s[name], PART).T for name in names] for names in (DQ, "qk")]
  _sum_over_channels(
    chunk,
    "products",
    [[(x, y) for y in dy] for x, dy in zip(raw, parts, strict=True)],
  )
  # dk first: its parts are where dq goes.
  for n, names in ((1, "qk"), (0, DQ)):
    high, low = (columns.load(chunk.key(x)) for x in names)
    dy = high.astype(jnp.float32) + low.astype(jnp.float32)
    x = columns.load(chunk.key(RAW[n])).astype(jnp.float32)
    norm = _norm(chunk, n)
    x = chunk.at_tokens(x) * _load_sum(chunk, "products", n)
    columns.store(chunk.key("qk"[n]), norm * (dy - x * norm * norm))

  @pl.when(chunk.half == 0)  # after the meetings of _sum_over_channels
  def _():
    for m in range(2):
      ref = chunk.vector("drates", m)
      other = plgpu.load(chunk.vector("drates", 2 + m), layout=ROWS.reduce(1))
      ref[...] = plgpu.load(ref, layout=ROWS.reduce(1)) + other
    plgpu.commit_smem()  # the TMA store reads it
    out = chunk.outputs[6]
    for m in range(2):
      plgpu.copy_smem_to_gmem(
        chunk.vector("drates", m),
        out.at[chunk.row, chunk.h, chunk.c, m, chunk.channels],
      )
