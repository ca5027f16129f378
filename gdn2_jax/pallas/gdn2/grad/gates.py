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

  def load(name):
    x = chunk.at_tokens(columns.load(chunk.key(name)))
    return x.astype(jnp.float32)

  b = chunk.erase_scale * projected.sigmoid(load("b"))
  columns.store(chunk.key("b"), b)
  _sum_over_channels(chunk, "squares", [[x * x] for x in map(load, "qk")])
  for n, name in enumerate("qk"):
    norm = lax.rsqrt(_load_sum(chunk, "squares", n) + projected.EPS)
    columns.store(chunk.key(name), load(name) * norm)


def _sum_over_channels(chunk, name, arrays):
  """Stores this warpgroup's sums of lists of arrays [channels, tokens].

  All warpgroups have seen them when it returns.
  """

  def store():
    for n, parts in enumerate(arrays):
      width = HALF // len(parts)
      for m, x in enumerate(parts):
        tokens = pl.ds(chunk.half * HALF + m * width, width)
        ref = chunk.s[name].at[n * chunk.tiles + chunk.tile, tokens]
        ref[...] = x.sum(axis=0)

  blocks.in_turns(chunk.wg, 2 * chunk.tiles, chunk.s["met"], store)


def _load_sum(chunk, name, n, block=None):
  """Total of sum_over_channels for list n as an array [channels, tokens]."""
  rows, width = chunk.rows, HALF
  if block is not None:
    rows, width = chunk.block(block), BLOCK
  total = sum(
    plgpu.load(
      chunk.s[name].at[n * chunk.tiles + tile, rows], layout=ROWS.reduce(0)
    )
    for tile in range(chunk.tiles)
  )
  return blocks.of_columns(total, (TILE, width))


def through_gate(chunk, block, db):
  """Gradient before the sigmoid of b, from that of b."""
  # Recomputed in float32: 1 - b of a gate rounded to 16 bits may be 0.
  b = projected.sigmoid(chunk.load_raw(2, block))
  return db * (chunk.erase_scale * b * (1.0 - b))


def through_norms(chunk, *gradients):
  """Gradients before the norms of q and k, from those after them.

  With y = x*r: dx = r*(dy - y (y . dy)). The difference cancels where dy is
  parallel to y, so a y that was rounded to 16 bits is not accurate enough.
  """
  products = [
    [chunk.load_raw(n, m) * x for m, x in enumerate(parts)]
    for n, parts in enumerate(gradients)
  ]
  _sum_over_channels(chunk, "products", products)
  results = []
  for n, parts in enumerate(gradients):
    results.append([])
    for m, dy in enumerate(parts):
      norm = lax.rsqrt(_load_sum(chunk, "squares", n, m) + projected.EPS)
      x = chunk.load_raw(n, m) * _load_sum(chunk, "products", n, m)
      results[n].append(norm * (dy - x * norm * norm))
  return results


def through_decay(chunk, dg):
  """Gradient of f, from that of g; writes the gradients of the rates."""
  results, drates = [], [0.0, 0.0]
  for n, x in enumerate(dg):
    rate, bias = (chunk.load_vector("rates", m, BLOCK) for m in range(2))
    f = chunk.load_raw(3, n) + bias
    df = x * rate * projected.sigmoid(f)
    results.append(df)
    for m, y in enumerate((x * projected.softplus(f), df)):
      drates[m] += y.sum(axis=1)

  @pl.when(chunk.half == 1)
  def _():
    for m in range(2):
      chunk.vector("drates", m)[...] = drates[m]

  chunk.meet()

  @pl.when(chunk.half == 0)
  def _():
    for m in range(2):
      ref = chunk.vector("drates", m)
      ref[...] = plgpu.load(ref, layout=ROWS.reduce(1)) + drates[m]
    plgpu.commit_smem()  # the TMA store reads it
    out = chunk.outputs[6]
    for m in range(2):
      plgpu.copy_smem_to_gmem(
        chunk.vector("drates", m),
        out.at[chunk.row, chunk.h, chunk.c, m, chunk.channels],
      )

  return results
