"""Caches of softmax attention, with keys and values of earlier tokens.

A sliding window needs the last `window` tokens, which are stored at position
mod window, in a ring of fixed size. Full attention needs all tokens, so its
cache has as many slots as a sequence may have tokens. All layers of a kind
share one array, and each updates its part in place: a decoding step moves the
keys and values that it reads, not the whole cache.
"""

from typing import Any

import jax.numpy as jnp
from flax import struct

from gdn2_jax.model.mixers.layer_cache import CacheLayer
from gdn2_jax.ops.attention.cached import cached_attention
from gdn2_jax.ops.segments import reset_counts, segment_positions


@struct.dataclass
class RingCache:
  """Keys and values of N layers; slot j has a position p with p mod W = j.

  Attributes:
    k, v: Rotated keys, and values, [N, B, HKV, W, D].
    positions: Position of the token in each slot [N, B, W], -1 if empty.
    next_position: Position of the next token [N, B].
  """

  # Any: tree transformations put objects other than arrays in these fields.
  k: Any
  v: Any
  positions: Any
  next_position: Any


@struct.dataclass
class KVCache:
  """Keys and values of N layers; slot j has the token at position j.

  Attributes:
    k, v: Rotated keys, and values, [N, B, HKV, S, D] with S = max_length.
    next_position: Position of the next token, and slots in use, [N, B].
  """

  k: Any
  v: Any
  next_position: Any


def next_position(part: CacheLayer) -> Any:
  """Position of the next token [B]."""
  return part.cache.next_position[part.layer]


def _held(part):
  """Position of the token in each slot [B, S], -1 if empty."""
  if isinstance(part.cache, RingCache):
    return part.cache.positions[part.layer]
  slot = jnp.arange(part.cache.k.shape[3], dtype=jnp.int32)[None]
  return jnp.where(slot < next_position(part)[:, None], slot, -1)


def init_kv_cache(
  shape: tuple[int, ...], dtype: Any, *, ring: bool
) -> RingCache | KVCache:
  """Empty cache of one layer, keys and values of shape [B, HKV, S, D]."""
  batch_size, _, slots, _ = shape
  arrays = {
    "k": jnp.zeros(shape, dtype),
    "v": jnp.zeros(shape, dtype),
    "next_position": jnp.zeros((batch_size,), jnp.int32),
  }
  if not ring:
    return KVCache(**arrays)
  return RingCache(
    positions=jnp.full((batch_size, slots), -1, jnp.int32), **arrays
  )


def attend_and_store(
  part: CacheLayer,
  q: Any,
  k: Any,
  v: Any,
  runs: Any,
  positions: Any,
  window: int | None,
) -> tuple[Any, CacheLayer]:
  """Attends to the cache and the new tokens, and stores the new tokens.

  Args:
    part: The layer's cache.
    q: Rotated queries of T new tokens [B, T, HQ, D].
    k: Rotated keys of the new tokens [B, T, HKV, D].
    v: Values of the new tokens [B, T, HKV, D].
    runs: [B, T], 1 for tokens that continue the cached document, 2, 3, ... for
      those of later documents, 0 for padding; None means 1.
    positions: Positions of the new tokens in their documents [B, T].
    window: Tokens that a query sees, its own included; None for all.

  Returns:
    o [B, T, HQ, D], and the cache after the tokens. It has the last document
    only; a KVCache stores of it what fits its slots.
  """
  cache, layer = part.cache, part.layer
  S = cache.k.shape[3]
  all_runs = jnp.ones_like(positions) if runs is None else runs
  end, in_last = _last_run(all_runs, positions, next_position(part))
  if isinstance(cache, RingCache):
    kept, slots = in_last & (positions >= end[:, None] - S), positions % S
  else:
    kept, slots = in_last & (positions < S), positions
  # A token that is not stored gets a slot beyond the cache.
  nowhere = S + jnp.arange(positions.shape[1], dtype=jnp.int32)[None]
  slots = jnp.where(kept, slots, nowhere)
  o, new_k, new_v = cached_attention(
    q,
    k,
    v,
    cache.k,
    cache.v,
    layer=layer,
    held=_held(part),
    positions=positions,
    slots=slots,
    window=window,
    segment_ids=runs,
  )
  new = cache.replace(
    k=new_k, v=new_v, next_position=cache.next_position.at[layer].set(end)
  )
  if isinstance(cache, RingCache):
    new = new.replace(positions=_ring_positions(part, runs, positions, slots))
  return o, part.replace(cache=new)


def lost_tokens(cache: Any, segment_ids: Any, length: int) -> Any:
  """Mask [B, T] of new tokens without a slot in the cache; None if all fit."""
  for part in cache:
    if isinstance(part, KVCache):
      first = part.next_position[0]
      runs, positions = runs_and_positions(first, length, segment_ids)
      lost = positions >= part.k.shape[3]
      return lost if runs is None else lost & (runs > 0)
  return None


def runs_and_positions(
  first: Any, length: int, segment_ids: Any
) -> tuple[Any, Any]:
  """Runs [B, T] (from 1; 0 is padding; None without ids) and positions."""
  if segment_ids is None:
    return None, first[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
  runs = jnp.where(segment_ids != 0, reset_counts(segment_ids) + 1, 0)
  return runs, segment_positions(segment_ids, first)


def _last_run(runs, positions, next_position):
  """Next position [B] after the tokens, and a mask of the last run."""
  number = runs.max(axis=1, keepdims=True)  # 0 if all is padding
  in_last = (runs == number) & (runs > 0)
  end = jnp.where(in_last, positions + 1, 0).max(axis=1)
  return jnp.where(number[:, 0] > 0, end, next_position), in_last


def _ring_positions(part, runs, positions, slots):
  """Positions in all slots of all layers after the tokens are stored."""
  held = part.cache.positions
  if runs is not None:  # a new document clears the ring
    restarted = runs.max(axis=1, keepdims=True) > 1
    held = held.at[part.layer].set(jnp.where(restarted, -1, _held(part)))
  rows = jnp.arange(positions.shape[0])[:, None]
  return held.at[part.layer, rows, slots].set(
    positions, mode="drop", unique_indices=True
  )
