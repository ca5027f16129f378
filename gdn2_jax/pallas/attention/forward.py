r"""Forward kernel of causal attention with a window and segments.

Query t sees the keys low_t, ..., t. A block of 64 queries loops over tiles of
64 keys and keeps, per query, the largest score m so far, the sum l of
exp(s - m), and o = sum exp(s - m) v. When m grows, both sums are multiplied by
exp(m_old - m_new). No exponent is above zero.

    s = scale * q k^T      o = sum exp(s - m) v / l      lse = m + log l

A block is one warpgroup; it loads the keys and values of the next tile while it
computes one. With D = 128 two blocks fit on a multiprocessor, so that products
of one can overlap with exponentials of the other.

Legend: B batch, T tokens, H key heads, G query heads of a key head, D channels
of a head; C = 64 queries or keys.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gdn2_jax.pallas import blocks
from gdn2_jax.pallas.blocks import TILE, C

STAGES = 2
PER_ROW = blocks.ROWS.reduce(1)
NEVER = -1e30  # below any score, and far from overflow in sums


def attention(q, k, v, low, *, scale, save):
  """Runs the kernel.

  Args:
    q: [B, T, H, G, D], 16-bit; T a multiple of 64, D of 64.
    k: [B, T, H, D], in the dtype of q.
    v: [B, T, H, D], in the dtype of q.
    low: [B, T] int32, the first key that a query sees, above T for none.
    scale: Factor on the scores.
    save: Return residuals for the backward pass.

  Returns:
    o [B, T, H, G, D] in the dtype of q; with `save` also the rounding error of
    o, in that dtype, and lse [B, H, G, T], float32.
  """
  B, T, H, G, D = q.shape
  tiles, dtype = D // TILE, q.dtype
  out_type = [blocks.struct(q.shape, dtype)]
  if save:
    out_type += [
      blocks.struct(q.shape, dtype),
      blocks.struct((B, H, G, T), jnp.float32),
    ]
  scratch = {
    "q": blocks.smem((tiles * C, TILE), dtype),  # then o
    "k": blocks.smem((STAGES * tiles * C, TILE), dtype),
    "v": blocks.smem((STAGES * tiles * C, TILE), dtype),
    "own_loaded": plgpu.Barrier(num_arrivals=tiles),
    "loaded": plgpu.Barrier(num_arrivals=2 * tiles, num_barriers=STAGES),
  }

  def body(q_gm, *refs):
    keys_gm, refs = refs[:4], refs[4:]
    outputs, refs = refs[: len(out_type)], refs[len(out_type) :]
    s = dict(zip(scratch, refs, strict=True))
    _body(q_gm, keys_gm, outputs, s, scale, tiles)

  out = blocks.call(
    "attention",
    body,
    out_type,
    scratch_types=list(scratch.values()),
    # Neighbouring blocks read the same keys, so they hit the cache.
    grid=(B, H, T // C, G),
    grid_names=("b", "h", "i", "g"),
  )(q, k, v, low, first_tiles(low))
  return tuple(out)


def first_tiles(low: Any) -> Any:
  """First tile of keys that each block of queries sees, [B, T / C]."""
  B, T = low.shape
  return low.reshape(B, T // C, C).min(axis=-1) // C


def fetch(source_gm, here, ref, slot, barrier, tiles):
  """Starts the loads of 64 tokens, one per tile of channels."""
  for n in range(tiles):
    plgpu.copy_gmem_to_smem(
      source_gm.at[(*here, pl.ds(n * TILE, TILE))],
      slot_of(ref, slot, n, tiles),
      barrier,
    )


def slot_of(ref, slot, n, tiles):
  """Channel tile n in a slot of a ring buffer."""
  return blocks.tile_of(ref, slot * tiles + n)


def scores(a, b, tiles):
  """Product a b^T [C, C] over all channels; a and b are (buffer, slot)."""
  pairs = [
    (slot_of(*a, n, tiles), blocks.transposed(slot_of(*b, n, tiles)))
    for n in range(tiles)
  ]
  return blocks.dot(blocks.zeros(C, C), *pairs)


def per_row(x: Any, columns: int = C) -> Any:
  """Broadcasts one number per row over columns."""
  return blocks.of_rows(x, (C, columns))


def load_rows(ref: Any) -> Any:
  """Loads one number per row from global memory."""
  return plgpu.load(ref, layout=PER_ROW, optimized=False)


def over_keys(keys_gm, s, here, scale, tiles, body, carry):
  """Loops carry = body(slot, scores, carry) over the keys of a query block.

  Args:
    keys_gm: k, v, low, and the first tile of keys of every block.
    s: Buffers q (one block), k and v (ring buffers), and barriers own_loaded
      (q and the block's other operands) and loaded (k and v).
    here: Batch row, key head and block of queries.
    scale: Factor on the scores.
    tiles: Number of channel tiles.
    body: Function of a slot, scores [C, C] and carry; scores are NEVER where a
      query does not see the key.
    carry: Initial value.
  """
  k_gm, v_gm, low_gm, first_gm = keys_gm
  b, h, i = here
  first = jnp.minimum(first_gm[b, i], i)

  def fetch_keys(j):
    slot, tokens = lax.rem(j, STAGES), (b, pl.ds(j * C, C), h)
    for source, name in ((k_gm, "k"), (v_gm, "v")):
      fetch(source, tokens, s[name], slot, s["loaded"].at[slot], tiles)

  fetch_keys(first)
  low = per_row(load_rows(low_gm.at[b, pl.ds(i * C, C)]))
  plgpu.barrier_wait(s["own_loaded"])
  r, c = blocks.iotas()

  def tile(j, carry):
    slot = lax.rem(j, STAGES)
    # wgmma has finished with the slot that is refilled. The interpreter reads
    # it by ordinary loads and needs them committed.
    plgpu.commit_smem()

    @pl.when(j < i)
    def _():
      fetch_keys(j + 1)

    plgpu.barrier_wait(s["loaded"].at[slot])
    x = scores((s["q"], 0), (s["k"], slot), tiles) * scale
    key = j * C + c
    x = jnp.where((key >= low) & (key <= i * C + r), x, NEVER)
    return body(slot, x, carry)

  return lax.fori_loop(first, i + 1, tile, carry)


def _body(q_gm, keys_gm, outputs, s, scale, tiles):
  b, h, i, g = (lax.axis_index(name) for name in ("b", "h", "i", "g"))
  queries = (b, pl.ds(i * C, C), h, g)
  fetch(q_gm, queries, s["q"], 0, s["own_loaded"], tiles)

  def tile(slot, x, carry):
    m, total, *o = carry
    new = jnp.maximum(m, x.max(axis=1))
    shift = jnp.exp(m - new)
    # If a row has seen no key, new = NEVER and exp(x - new) would be exp(0).
    p = jnp.where(x > NEVER / 2, jnp.exp(x - per_row(new)), 0.0)
    total = total * shift + p.sum(axis=1)
    p = p.astype(s["v"].dtype)
    o = [
      blocks.in_rows(
        blocks.dot(
          acc * per_row(shift, TILE), (p, slot_of(s["v"], slot, n, tiles))
        )
      )
      for n, acc in enumerate(o)
    ]
    return (
      plgpu.layout_cast(new, PER_ROW),
      plgpu.layout_cast(total, PER_ROW),
      *o,
    )

  start = jnp.zeros((C,), jnp.float32)
  nothing = (
    plgpu.layout_cast(start + NEVER, PER_ROW),
    plgpu.layout_cast(start, PER_ROW),
    *(blocks.zeros() for _ in range(tiles)),
  )
  m, total, *o = over_keys(keys_gm, s, (b, h, i), scale, tiles, tile, nothing)
  some = jnp.where(total > 0, total, 1.0)
  o = [acc / per_row(some, TILE) for acc in o]
  if len(outputs) > 1:
    # For a query without keys, so that all its weights exp(s - lse) are 0.
    lse = jnp.where(total > 0, m + jnp.log(some), -NEVER)
    blocks.store_untiled(outputs[2].at[b, h, g, pl.ds(i * C, C)], lse)
  parts = [o]
  if len(outputs) > 1:
    dtype = s["q"].dtype
    parts.append([acc - acc.astype(dtype).astype(jnp.float32) for acc in o])
  for part, out_gm in zip(parts, outputs, strict=False):
    # All products with q are done: its buffer is free, after the first part
    # once the TMA stores have read that.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for n, acc in enumerate(part):
      blocks.tile_of(s["q"], n)[...] = acc.astype(s["q"].dtype)
    plgpu.commit_smem()  # the TMA stores read it
    for n in range(tiles):
      plgpu.copy_smem_to_gmem(
        blocks.tile_of(s["q"], n), out_gm.at[(*queries, pl.ds(n * TILE, TILE))]
      )
  plgpu.wait_smem_to_gmem(0)  # before the block ends


SHAPES = (
  # Label, key heads, query heads of each, channels, dtype.
  ("", 18, 1, 128, "bfloat16"),
  (" G=4 D=64", 4, 4, 64, "bfloat16"),
  (" float16", 18, 1, 128, "float16"),
)


def shapes(H: int, G: int, D: int, dtype: str) -> tuple[Any, ...]:
  """Shapes of q, k (and v), low and lse in the cases to compile."""
  B, T, struct = 4, 4096, jax.ShapeDtypeStruct
  q, k = struct((B, T, H, G, D), dtype), struct((B, T, H, D), dtype)
  return q, k, struct((B, T), "int32"), struct((B, H, G, T), "float32")


def aot_cases() -> list[tuple[str, Callable, list[Any], dict[str, int]]]:
  """Representative calls: name, function, shapes of arguments, options."""
  cases = []
  for label, H, G, D, dtype in SHAPES:
    q, k, low, _ = shapes(H, G, D, dtype)
    options = {"token_heads": q.shape[0] * q.shape[1] * H * G}
    for name, save in (("attention", False), ("attention, saving", True)):
      call = functools.partial(attention, scale=D**-0.5, save=save)
      cases.append((f"{name}{label}", call, [q, k, k, low], options))
  return cases
