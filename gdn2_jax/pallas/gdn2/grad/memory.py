"""Shared memory and barriers of intra_grad.py.

Who stores a buffer > who reads it: what is between the two. A thread reads what
it stored itself without a barrier.

  kinds, rates, q, k, b      TMA > all: keys_loaded
  q, k, b, a, changed        a channel's thread > itself; after the first meet,
                             because norms are computed before it
  totals, norms              one warpgroup > all: the first meet
  E_neg, Kd                  a channel's thread > wgmma of all: the second meet
  A, Aqk                     TMA > all: A_loaded
  S, dS, v, w, dO            TMA > all: values_loaded; of the next tile after
                             wait_smem_to_gmem and the meet that ends a tile
  X in R, dR in dX           a warpgroup > its wgmma: commit_smem; sync_warps
                             before R and dX are stored there
  R, dX                      a warpgroup > all: meet
  dw, dv in v, w             a token's thread > TMA: commit_smem; all others
                             have read v and w before meet
  dgamma_C                   a channel's thread > the other half: meet
  scores and diagonals       a warpgroup > all: meet; in memory of the values,
                             free since the meet that ends a tile
  X, Q, sums of level 32     a channel's thread > the other half: meet
  saved, drates              a thread > itself, drates the other half: last meet
  raw_b, raw_f               TMA, after the meet that ends a tile > all:
                             raw_loaded
  along                      a warp, 16 tokens each > all: arrive, wait
  dq, dk, db in q, k, b,     a channel's thread > TMA: last meet
  df in raw_f
"""

from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from gdn2_jax.pallas.blocks import TILE, C, tiled
from gdn2_jax.pallas.gdn2.grad.channel_sums import WARPS
from gdn2_jax.pallas.gdn2.grad.columns import BLOCK, HALF, LEVELS, PART

# The buffer of dX has two parts [C, 32] each of its high parts, its low parts,
# and dO.
DO, DX_PARTS = 2, 6
# Rows of `totals`: decays of blocks of 16 tokens, from HALVES on of 32.
HALVES, TOTALS = C // BLOCK, C // BLOCK + 2
RAW = ("raw_b", "raw_f")


class Memory:
  """Scratch of the kernel for one number of key channels.

  Attributes:
    types: Scratch types, in the order in which the kernel gets references.
  """

  def __init__(self, K: int, dtype: Any, *, is_projected: bool):
    tiles = K // TILE
    wide = tiled((C, K), dtype, PART)
    square = tiled((C, C), dtype, PART)
    state = tiled((2 * K, PART), dtype, PART)
    values = tiled((2 * C, PART), dtype, PART)
    half = tiled((2 * K, HALF), dtype, BLOCK)
    named = {
      "q": wide,
      "k": wide,
      "b": wide,
      "kinds": plgpu.SMEM((C,), jnp.int32),
      "a": tiled((K, C), jnp.float32, BLOCK),
      "totals": plgpu.SMEM((TOTALS, K), jnp.float32),
      "dgamma_C": plgpu.SMEM((2, K), jnp.float32),
      "diagonal": plgpu.SMEM((C,), jnp.float32),  # of dAqk
      "keys_loaded": plgpu.Barrier(num_arrivals=4 + is_projected),
      "A_loaded": plgpu.Barrier(num_arrivals=2),
      "values_loaded": plgpu.Barrier(num_arrivals=10),
      "met": plgpu.Barrier(num_arrivals=2 * tiles),
    }
    # Four arrays [64, 16] of each warpgroup.
    saved = {"saved": plgpu.SMEM((4 * 2 * K * BLOCK,), jnp.float32)}
    if is_projected:
      named["rates"] = plgpu.SMEM((2, K), jnp.float32)
      named["raw_loaded"] = plgpu.Barrier(num_arrivals=2)
      named["norms"] = plgpu.SMEM((2, C), jnp.float32)  # 1 / |q|, 1 / |k|
      # Of q and k times their gradients, of every 16 tokens and 64 channels.
      saved["along"] = plgpu.SMEM(
        (C // BLOCK * tiles, BLOCK, 2, WARPS), jnp.float32
      )
      saved["drates"] = plgpu.SMEM((4, K), jnp.float32)  # two of each half
    # For the sums over values, and what takes its place afterwards.
    unions = [
      (
        {
          "S": state,
          "dS": state,
          "v": values,
          "w": values,
          "R": tiled((4 * C, PART), dtype, PART),  # high, low parts
        },
        {
          # Blocks on the diagonal of the scores, masked for each level.
          "diagonals": tiled((len(LEVELS) * 4 * C, BLOCK), dtype, BLOCK),
          # b and f before the gates.
          **(dict.fromkeys(RAW, wide) if is_projected else {}),
        },
      ),
      (
        {
          "E_neg": wide,
          "Kd": wide,
          # Of 128 channels there is no room for the low part.
          **({"Kd_low": wide} if tiles == 1 else {}),
          "A": square,
          "Aqk": square,
          "dX": tiled((DX_PARTS * C, PART), dtype, PART),
        },
        {
          # d(-T) and dAqk below the diagonal, high and low parts.
          "scores": tiled((4 * C, C), dtype, BLOCK),
          "X": half,
          "Q": half,
          "sums": plgpu.SMEM((2, K), jnp.float32),
        },
        saved,
      ),
    ]
    self._names, self._unions = tuple(named), unions
    self.types = [
      *named.values(),
      *(
        plgpu.RefUnion(*(list(group.values()) for group in union))
        for union in unions
      ),
    ]

  def unpack(self, refs: Any) -> dict[str, Any]:
    """References by name."""
    count = len(self._names)
    s = dict(zip(self._names, refs[:count], strict=True))
    for union, parts in zip(self._unions, refs[count:], strict=True):
      for group, members in zip(union, parts, strict=True):
        s |= zip(group, members, strict=True)
    return s
