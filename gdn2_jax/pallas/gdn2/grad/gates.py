"""Norms and gates of the layer in intra_grad.py: their values and gradients.

See projected.py. A sum over channels passes from warp to warp, so warpgroups
take turns; one over tokens stays within four lanes.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gdn2_jax.pallas import blocks, projected
from gdn2_jax.pallas.blocks import ROWS, TILE
from gdn2_jax.pallas.gdn2.grad import columns
from gdn2_jax.pallas.gdn2.grad.columns import BLOCK, HALF


def log_decay(chunk, f):
  """g of this warpgroup's channels and tokens, not masked."""
  x = chunk.at_tokens(f) + chunk.load_vector("rates", 1)
  return chunk.load_vector("rates", 0) * projected.softplus(x)


def take_inputs(chunk):
  """Replaces q, k and b by what the norms and the gate make of them."""
  chunk = chunk.recomputed()

  def load(name):
    x = chunk.at_tokens(columns.load(chunk.key(name)))
    return x.astype(jnp.float32)

  b = chunk.erase_scale * projected.sigmoid(load("b"))
  columns.store(chunk.key("b"), b)
  _sum_over_channels(chunk, "squares", [x * x for x in map(load, "qk")])
  for n, name in enumerate("qk"):
    norm = lax.rsqrt(_load_sum(chunk, "squares", n) + projected.EPS)
    columns.store(chunk.key(name), load(name) * norm)


def _sum_over_channels(chunk, name, arrays):
  """Stores this warpgroup's sums of arrays [channels, tokens].

  All warpgroups have seen them when it returns.
  """

  def store():
    for n, x in enumerate(arrays):
      at = n * chunk.tiles + chunk.tile
      chunk.s[name].at[at, chunk.rows][...] = x.sum(axis=0)

  blocks.in_turns(chunk.turn, 2 * chunk.tiles, chunk.s["met"], store)


def _load_sum(chunk, name, n):
  """Total of sum_over_channels for array n as an array [channels, tokens]."""
  total = sum(
    plgpu.load(
      chunk.s[name].at[n * chunk.tiles + tile, chunk.rows],
      layout=ROWS.reduce(0),
    )
    for tile in range(chunk.tiles)
  )
  return blocks.of_columns(total, (TILE, HALF))


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


def _saved(chunk, block=None):
  """Memory for the gradients after the norms: dq, high and low part of dk.

  That of a, q and k, which are not used again.
  """
  rows = chunk.rows if block is None else chunk.block(block)
  dq = chunk.s["a"].at[chunk.channels, rows]
  return dq, chunk.key("q", rows), chunk.key("k", rows)


def save(chunk, block, dq, dk):
  """Keeps the gradients after the norms of 16 tokens, for `finish`."""
  ref, *parts = _saved(chunk, block)
  ref[...] = dq
  for part, x in zip(parts, blocks.split(dk, parts[0].dtype), strict=True):
    columns.store(part, x)


def finish(chunk):
  """Gradients before the norms over q and k; writes those of the rates.

  With y = x*r: dx = r*(dy - y (y . dy)). The difference cancels where dy is
  parallel to y, so a y that was rounded to 16 bits is not accurate enough.
  """
  chunk = chunk.recomputed()
  dq, high, low = _saved(chunk)
  dq = plgpu.layout_cast(blocks.load(dq), ROWS)
  high, low = (columns.load(x).astype(jnp.float32) for x in (high, low))
  gradients = dq, high + low
  products = [chunk.load_raw(n) * dy for n, dy in enumerate(gradients)]
  _sum_over_channels(chunk, "products", products)
  chunk = chunk.recomputed()
  for n, (name, dy) in enumerate(zip("qk", gradients, strict=True)):
    norm = lax.rsqrt(_load_sum(chunk, "squares", n) + projected.EPS)
    x = chunk.load_raw(n) * _load_sum(chunk, "products", n)
    columns.store(chunk.key(name), norm * (dy - x * norm * norm))

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
