r"""Backward pass of forward.py, in two kernels.

With p = exp(s - lse) and delta = sum over channels of do * o,

    ds = scale * p * (do v^T - delta)
    dq = ds k        dk = ds^T q        dv = p^T do

For dq, a block of the first kernel has 64 queries and loops over their keys.
For dk and dv, a block of the second has 64 keys and loops over the queries that
see them, one query head of the group after the other. It computes transposed
scores, so that p^T and ds^T are operands of wgmma without a transpose.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gdn2_jax.pallas import blocks
from gdn2_jax.pallas.attention.forward import (
  NEVER,
  SHAPES,
  STAGES,
  fetch,
  first_tiles,
  load_rows,
  over_keys,
  per_row,
  scores,
  shapes,
  slot_of,
)
from gdn2_jax.pallas.blocks import TILE, C


def attention_grad(q, k, v, low, do, lse, delta, *, scale):
  """Runs the kernels.

  Args:
    q: [B, T, H, G, D]; q, k, v and low as in forward.attention.
    k: [B, T, H, D].
    v: [B, T, H, D].
    low: [B, T] int32.
    do: Gradient of o [B, T, H, G, D], in the dtype of q.
    lse: [B, H, G, T], float32, from forward.attention.
    delta: [B, H, G, T], float32.
    scale: Factor on the scores.

  Returns:
    dq, dk and dv, in the shapes and dtypes of q, k and v.
  """
  dq = _queries(q, k, v, low, do, lse, delta, scale)
  return dq, *_keys(q, k, v, low, do, lse, delta, scale)


def _queries(q, k, v, low, do, lse, delta, scale):
  B, T, H, G, D = q.shape
  tiles, dtype = D // TILE, q.dtype
  own, ring = (tiles * C, TILE), (STAGES * tiles * C, TILE)
  scratch = {
    "q": blocks.smem(own, dtype),  # then dq
    "do": blocks.smem(own, dtype),
    "k": blocks.smem(ring, dtype),
    "v": blocks.smem(ring, dtype),
    "own_loaded": plgpu.Barrier(num_arrivals=2 * tiles),
    "loaded": plgpu.Barrier(num_arrivals=2 * tiles, num_barriers=STAGES),
  }

  def body(q_gm, do_gm, lse_gm, delta_gm, *refs):
    keys_gm, dq_gm, refs = refs[:4], refs[4], refs[5:]
    s = dict(zip(scratch, refs, strict=True))
    b, h, i, g = (lax.axis_index(name) for name in ("b", "h", "i", "g"))
    tokens = pl.ds(i * C, C)
    queries = (b, tokens, h, g)
    for source, name in ((q_gm, "q"), (do_gm, "do")):
      fetch(source, queries, s[name], 0, s["own_loaded"], tiles)
    lse, delta = (
      per_row(load_rows(ref.at[b, h, g, tokens])) for ref in (lse_gm, delta_gm)
    )

    def tile(slot, x, dq):
      dp = scores((s["do"], 0), (s["v"], slot), tiles)
      ds = (jnp.exp(x - lse) * (dp - delta) * scale).astype(dtype)
      return tuple(
        blocks.in_rows(blocks.dot(acc, (ds, slot_of(s["k"], slot, n, tiles))))
        for n, acc in enumerate(dq)
      )

    zeros = tuple(blocks.zeros() for _ in range(tiles))
    dq = over_keys(keys_gm, s, (b, h, i), scale, tiles, tile, zeros)
    _store(dq, s["q"], dq_gm, queries)  # all products with q are done
    plgpu.wait_smem_to_gmem(0)  # before the block ends

  (dq,) = blocks.call(
    "attention_grad_q",
    body,
    [blocks.struct(q.shape, dtype)],
    scratch_types=list(scratch.values()),
    grid=(B, H, T // C, G),
    grid_names=("b", "h", "i", "g"),
  )(q, do, lse, delta, k, v, low, first_tiles(low))
  return dq


def _store(parts, ref, out_gm, here):
  for n, acc in enumerate(parts):
    blocks.tile_of(ref, n)[...] = acc.astype(ref.dtype)
  plgpu.commit_smem()  # the TMA stores read it
  for n in range(len(parts)):
    plgpu.copy_smem_to_gmem(
      blocks.tile_of(ref, n), out_gm.at[(*here, pl.ds(n * TILE, TILE))]
    )


def _keys(q, k, v, low, do, lse, delta, scale):
  B, T, H, G, D = q.shape
  tiles, dtype = D // TILE, q.dtype
  own, ring = (tiles * C, TILE), (STAGES * tiles * C, TILE)
  scratch = {
    "k": blocks.smem(own, dtype),  # then dk
    "v": blocks.smem(own, dtype),  # then dv
    "q": blocks.smem(ring, dtype),
    "do": blocks.smem(ring, dtype),
    "low": plgpu.SMEM((STAGES, C), jnp.int32),
    "lse": plgpu.SMEM((STAGES, C), jnp.float32),
    "delta": plgpu.SMEM((STAGES, C), jnp.float32),
    "own_loaded": plgpu.Barrier(num_arrivals=2 * tiles),
    "loaded": plgpu.Barrier(num_arrivals=2 * tiles + 3, num_barriers=STAGES),
  }

  def body(
    q_gm, do_gm, k_gm, v_gm, low_gm, lse_gm, delta_gm, last_gm, dk_gm, dv_gm, *r
  ):
    s = dict(zip(scratch, r, strict=True))
    b, h, j = (lax.axis_index(name) for name in ("b", "h", "j"))
    keys = (b, pl.ds(j * C, C), h)
    blocks_of_queries = last_gm[b, j] - j + 1
    count = G * blocks_of_queries

    def fetch_queries(n):
      slot = lax.rem(n, STAGES)
      g, i = lax.div(n, blocks_of_queries), j + lax.rem(n, blocks_of_queries)
      tokens, loaded = pl.ds(i * C, C), s["loaded"].at[slot]
      for source, name in ((q_gm, "q"), (do_gm, "do")):
        fetch(source, (b, tokens, h, g), s[name], slot, loaded, tiles)
      plgpu.copy_gmem_to_smem(low_gm.at[b, tokens], s["low"].at[slot], loaded)
      for source, name in ((lse_gm, "lse"), (delta_gm, "delta")):
        plgpu.copy_gmem_to_smem(
          source.at[b, h, g, tokens], s[name].at[slot], loaded
        )

    for source, name in ((k_gm, "k"), (v_gm, "v")):
      fetch(source, keys, s[name], 0, s["own_loaded"], tiles)

    @pl.when(count > 0)
    def _():
      fetch_queries(jnp.int32(0))

    plgpu.barrier_wait(s["own_loaded"])
    r, c = blocks.iotas()
    key = j * C + r

    def tile(n, carry):
      dk, dv = carry[:tiles], carry[tiles:]
      slot = lax.rem(n, STAGES)
      # Orders the loads of low, lse and delta of the last tile before the TMA
      # loads that refill their slot.
      plgpu.commit_smem()

      @pl.when(n + 1 < count)
      def _():
        fetch_queries(n + 1)

      plgpu.barrier_wait(s["loaded"].at[slot])

      def per_query(name):
        x = plgpu.load(s[name].at[slot], layout=blocks.ROWS.reduce(0))
        return blocks.of_columns(x, (C, C))

      # Every value is computed where it is used, to save registers.
      x = scores((s["k"], 0), (s["q"], slot), tiles) * scale
      query = (j + lax.rem(n, blocks_of_queries)) * C + c
      x = jnp.where((key >= per_query("low")) & (key <= query), x, NEVER)
      p = jnp.exp(x - per_query("lse"))
      dv = [
        blocks.in_rows(
          blocks.dot(acc, (p.astype(dtype), slot_of(s["do"], slot, n, tiles)))
        )
        for n, acc in enumerate(dv)
      ]
      dp = scores((s["v"], 0), (s["do"], slot), tiles)
      ds = (p * (dp - per_query("delta")) * scale).astype(dtype)
      dk = [
        blocks.in_rows(blocks.dot(acc, (ds, slot_of(s["q"], slot, n, tiles))))
        for n, acc in enumerate(dk)
      ]
      return (*dk, *dv)

    zeros = tuple(blocks.zeros() for _ in range(2 * tiles))
    out = lax.fori_loop(jnp.int32(0), count, tile, zeros)
    # All products with k and v are done: their buffers are free.
    _store(out[:tiles], s["k"], dk_gm, keys)
    _store(out[tiles:], s["v"], dv_gm, keys)
    plgpu.wait_smem_to_gmem(0)  # before the block ends

  return tuple(
    blocks.call(
      "attention_grad_kv",
      body,
      [blocks.struct(k.shape, dtype), blocks.struct(v.shape, dtype)],
      scratch_types=list(scratch.values()),
      grid=(B, H, T // C),
      grid_names=("b", "h", "j"),
    )(q, do, k, v, low, lse, delta, _last(low))
  )


def _last(low):
  """Last block of queries that sees a key of each block, [B, T / C]."""
  first = first_tiles(low)
  i = jnp.arange(first.shape[1], dtype=jnp.int32)
  sees = (first[:, :, None] <= i[None, None]) & (
    i[None, :, None] >= i[None, None]
  )
  return jnp.max(jnp.where(sees, i[None, :, None], i[None, None] - 1), axis=1)


def aot_cases() -> list[tuple[str, Callable, list[Any], dict[str, int]]]:
  """Representative calls: name, function, shapes of arguments, options."""
  cases = []
  for label, H, G, D, dtype in SHAPES:
    q, k, low, rows = shapes(H, G, D, dtype)
    options = {"token_heads": q.shape[0] * q.shape[1] * H * G}
    for name, run in (("q", _queries), ("k v", _keys)):
      call = functools.partial(run, scale=D**-0.5)
      operands = [q, k, k, low, q, rows, rows]
      cases.append(
        (f"attention gradient {name}{label}", call, operands, options)
      )
  return cases
