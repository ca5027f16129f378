"""Gated DeltaNet-2 in Triton: one token, and a loop over tokens.

Legend: K key channels, V value channels of all the value heads of a key head,
T tokens. S is a [BLOCK_K, BLOCK_V] tile of a state, held in registers. Columns
of S never meet, so that every tile of V is a program of its own.

For one head and one token (Eq. 10):

  S <- exp(g) S;  u = w*v - S^T (b*k);  o = scale (S^T q + (q.k) u);
  S <- S + k u^T

where the output is that of the new S: both products with S read the old one,
and neither waits for the other. All arithmetic is float32 and there is no
tl.dot, so that TF32 cannot enter.

This file imports triton and nothing else: load it lazily.
"""

from typing import NamedTuple, no_type_check

import triton
import triton.language as tl


class Blocks(NamedTuple):
  """Tile and warps of a program."""

  block_k: int  # all key channels: a power of two >= K
  block_v: int  # value channels of a tile
  num_warps: int

  def programs(self, heads: int, V: int) -> int:
    """Programs for `heads` states (batch rows times heads)."""
    return heads * triton.cdiv(V, self.block_v)


def step_blocks(K: int, V: int) -> Blocks:
  """Tile of gdn2_step_kernel: coalesced rows of 128 bytes of the state."""
  block_v = min(32, triton.next_power_of_2(V))
  return Blocks(triton.next_power_of_2(K), block_v, 4)


def sequence_blocks(K: int, V: int) -> Blocks:
  """Tile of gdn2_sequence_kernel: one warp, narrow tiles.

  A tile of one warp sums over K by shuffles alone, without a barrier in every
  token. Eight columns are a 32-byte sector of the state.
  """
  del V
  return Blocks(triton.next_power_of_2(K), 8, 1)


# no_type_check keeps the suite's type checker from wrapping what Triton reads
# as source.
@triton.jit
@no_type_check
def _token(S, q, k, v, g, b, w):
  """Eq. 10 for a tile: the output before scaling, and the new S."""
  S = tl.exp(g)[:, None] * S
  u = w * v - tl.sum((b * k)[:, None] * S, axis=0)
  o = tl.sum(q[:, None] * S, axis=0) + tl.sum(q * k, axis=0) * u
  return o, S + k[:, None] * u[None, :]


@triton.jit
@no_type_check
def _load_token(
  q_ptr, k_ptr, v_ptr, g_ptr, b_ptr, w_ptr, at_k, at_v, is_k, is_v
):
  """The six inputs of a token in float32, zero where masked."""
  q = tl.load(q_ptr + at_k, mask=is_k, other=0.0).to(tl.float32)
  k = tl.load(k_ptr + at_k, mask=is_k, other=0.0).to(tl.float32)
  v = tl.load(v_ptr + at_v, mask=is_v, other=0.0).to(tl.float32)
  g = tl.load(g_ptr + at_k, mask=is_k, other=0.0).to(tl.float32)
  b = tl.load(b_ptr + at_k, mask=is_k, other=0.0).to(tl.float32)
  w = tl.load(w_ptr + at_v, mask=is_v, other=0.0).to(tl.float32)
  return q, k, v, g, b, w


@triton.jit
@no_type_check
def gdn2_step_kernel(
  q_ptr,
  k_ptr,
  v_ptr,
  g_ptr,
  b_ptr,
  w_ptr,
  state_in_ptr,
  o_ptr,
  state_ptr,
  SCALE: tl.constexpr,
  K: tl.constexpr,
  V: tl.constexpr,
  BLOCK_K: tl.constexpr,
  BLOCK_V: tl.constexpr,
):
  """Runs one token.

  q, k, g, b are [N, K], v, w, o [N, V] and states [N, K, V], where N counts
  batch rows times heads. The two states may be the same memory: a
  program reads its tile before it writes it, and no other program does either.
  """
  tiles: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
  n = (tl.program_id(0) // tiles).to(tl.int64)
  in_k = tl.arange(0, BLOCK_K)
  in_v = (tl.program_id(0) % tiles) * BLOCK_V + tl.arange(0, BLOCK_V)
  is_k = in_k < K
  is_v = in_v < V
  at_k = n * K + in_k
  at_v = n * V + in_v
  at_S = n * K * V + in_k[:, None] * V + in_v[None, :]
  is_S = is_k[:, None] & is_v[None, :]

  S = tl.load(state_in_ptr + at_S, mask=is_S, other=0.0)
  q, k, v, g, b, w = _load_token(
    q_ptr, k_ptr, v_ptr, g_ptr, b_ptr, w_ptr, at_k, at_v, is_k, is_v
  )
  o, S = _token(S, q, k, v, g, b, w)
  o = (SCALE * o).to(o_ptr.dtype.element_ty)
  tl.store(o_ptr + at_v, o, mask=is_v)
  tl.store(state_ptr + at_S, S, mask=is_S)


@triton.jit
@no_type_check
def gdn2_sequence_kernel(
  q_ptr,
  k_ptr,
  v_ptr,
  g_ptr,
  b_ptr,
  w_ptr,
  state_in_ptr,
  segment_ids_ptr,
  T,
  o_ptr,
  state_ptr,
  SCALE: tl.constexpr,
  H: tl.constexpr,
  K: tl.constexpr,
  V: tl.constexpr,
  BLOCK_K: tl.constexpr,
  BLOCK_V: tl.constexpr,
  HAS_SEGMENTS: tl.constexpr,
):
  """Runs T tokens.

  q, k, g, b are [B, T, H, K], v, w, o [B, T, H, V] and segment ids [B, T].
  Without HAS_SEGMENTS segment_ids_ptr is not read. A token whose id differs
  from that of the last token before it that is not padding starts from S = 0;
  id 0 is padding. The two states [B, H, K, V] may be the same memory.
  """
  tiles: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
  n = (tl.program_id(0) // tiles).to(tl.int64)
  row = n // H
  in_k = tl.arange(0, BLOCK_K)
  in_v = (tl.program_id(0) % tiles) * BLOCK_V + tl.arange(0, BLOCK_V)
  is_k = in_k < K
  is_v = in_v < V
  at_S = n * K * V + in_k[:, None] * V + in_v[None, :]
  is_S = is_k[:, None] & is_v[None, :]
  S = tl.load(state_in_ptr + at_S, mask=is_S, other=0.0)

  first = row * T * H + n % H  # index of (row, token 0, head)
  at_k = first * K + in_k
  at_v = first * V + in_v
  segment_ids_ptr += row * T
  last = 0  # id of the last token that was not padding, 0 before there is one
  # The inputs of a token are asked for one token ahead: the loop waits for S
  # and not for memory.
  q, k, v, g, b, w = _load_token(
    q_ptr, k_ptr, v_ptr, g_ptr, b_ptr, w_ptr, at_k, at_v, is_k, is_v
  )
  for t in range(T):
    more = t + 1 < T
    next_k = at_k + H * K
    next_v = at_v + H * V
    q_next, k_next, v_next, g_next, b_next, w_next = _load_token(
      q_ptr,
      k_ptr,
      v_ptr,
      g_ptr,
      b_ptr,
      w_ptr,
      next_k,
      next_v,
      is_k & more,
      is_v & more,
    )
    if HAS_SEGMENTS:
      segment = tl.load(segment_ids_ptr + t)
      live = segment != 0
      restart = live & (last != 0) & (segment != last)
      last = tl.where(live, segment, last)
      # Selected, not multiplied by zero: what is not finite in one document
      # stays there. Padding may hold anything; as zeros it leaves S as it is.
      S = tl.where(restart, 0.0, S)
      q = tl.where(live, q, 0.0)
      k = tl.where(live, k, 0.0)
      v = tl.where(live, v, 0.0)
      g = tl.where(live, g, 0.0)
      b = tl.where(live, b, 0.0)
      w = tl.where(live, w, 0.0)
    o, S = _token(S, q, k, v, g, b, w)
    o = (SCALE * o).to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + at_v, o, mask=is_v)
    at_k = next_k
    at_v = next_v
    q, k, v = q_next, k_next, v_next
    g, b, w = g_next, b_next, w_next
  tl.store(state_ptr + at_S, S, mask=is_S)
