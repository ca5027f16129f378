"""(I + T)^-1 on compressed blocks, by one warpgroup.

Diagonal blocks of 16 rows by forward substitution in float32; then two merges
of neighbours (README.md section 3). A block diagonal matrix of [C, C] is kept
as [C, 16] or [C, 32]: its blocks below one another. Operands of the merges are
split into a high and a low part, because entries of the inverse may be large
and cancel.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gdn2_jax.pallas import blocks, inline
from gdn2_jax.pallas.blocks import C
from gdn2_jax.pallas.gdn2.chunk.rows import R

_BLOCKS = C // R


def scratch(dtype: Any) -> dict[str, Any]:
  """Shared memory of `invert`, whose operands have a 16-bit dtype."""
  halves = blocks.tiled((2 * C, 2 * R), dtype, R)  # high, low; left and right
  return {
    "diagonal": plgpu.SMEM((C, R), jnp.float32),
    "inverses": plgpu.SMEM((C, 2 * R), jnp.float32),  # 16 columns are used
    "X": halves,
    "W": halves,
  }


def invert(s: Any) -> None:
  """Stores (I + T)^-1 in s["A"], of -T in s["T"]; the caller commits it."""
  r = plgpu.broadcasted_iota(jnp.int32, (C, R), 0, layout=blocks.ROWS)
  block = lax.shift_right_logical(r, 4)  # of 16 rows
  dtype = s["X"].dtype

  def columns_of_T():
    T = blocks.load(s["T"])
    return [T[:, R * j : R * (j + 1)] for j in range(_BLOCKS)]

  def of_blocks(columns):
    """Of every block of rows its own part, {block: columns}, or zero."""
    x = jnp.zeros((C, R), jnp.float32)
    for j, part in columns.items():
      x = jnp.where(block == j, part, x)
    return x

  part = columns_of_T()
  blocks.store_untiled(s["diagonal"], of_blocks(dict(enumerate(part))))
  plgpu.commit_smem()  # another thread reads it
  inline.substitute(s["diagonal"], s["inverses"])
  plgpu.commit_smem()  # as above
  D = plgpu.load(
    s["inverses"].at[:, pl.ds(0, R)], layout=blocks.ROWS, optimized=False
  )
  part = columns_of_T()  # once more, to save registers

  def keep(name, side, x):
    for low, y in enumerate(blocks.split(x, dtype)):
      s[name].at[pl.ds(low * C, C), pl.ds(side * R, x.shape[1])][...] = y

  def product(lefts, name, columns):
    """Sum over j of lefts[j] [C, 16] times rows of block j of a buffer."""
    pairs = []
    for j, x in lefts.items():
      right = tuple(
        s[name].at[pl.ds(low * C + R * j, R), pl.ds(0, columns)]
        for low in (0, 1)
      )
      pairs += blocks.split_pairs(blocks.split(x, dtype), right)
    return blocks.dot(blocks.zeros(C, columns), *pairs)

  # Blocks of 32 rows: left of an odd block D is D (-T' D_even).
  keep("X", 0, D)
  plgpu.commit_smem()  # wgmma reads X
  W = product({j: of_blocks({j + 1: part[j]}) for j in (0, 2)}, "X", R)
  keep("W", 0, W)
  plgpu.commit_smem()  # wgmma reads W
  Z = product({j: of_blocks({j: D}) for j in (1, 3)}, "W", R)
  is_odd = (block & 1) != 0
  left = jnp.where(is_odd, Z, D)
  right = jnp.where(is_odd, D, 0.0)
  # The chunk, likewise. X and W are free: `dot` has waited.
  keep("X", 0, left)
  keep("X", 1, right)
  plgpu.commit_smem()  # wgmma reads X
  keep("W", 0, product({0: part[0], 1: part[1]}, "X", 2 * R))
  plgpu.commit_smem()  # wgmma reads W
  Z = product({2: left, 3: right}, "W", 2 * R)
  is_lower = block >= _BLOCKS // 2
  for side, x in enumerate((left, right)):
    z = Z[:, R * side : R * (side + 1)]
    for first, y in (
      (0, jnp.where(is_lower, z, x)),
      (2, jnp.where(is_lower, x, 0.0)),
    ):
      A = s["A"].at[:, pl.ds(R * (first + side), R)]
      A[...] = y.astype(A.dtype)
