"""Caches of softmax attention: keys and values of earlier tokens.

A sliding window needs those of the last `window` tokens, which lie in slots
position mod window: a ring that never grows. Full attention needs all of them,
in as many slots as a sequence may have tokens. All layers of a kind share one
array and each works on its own part of it in place, so that a decoding step
moves the keys and values that it reads and not the whole cache.
"""

from typing import Any

import jax.numpy as jnp
from flax import struct

from gdn2_jax.ops.attention.cached import cached_attention
from gdn2_jax.ops.segments import reset_counts, segment_positions


@struct.dataclass
class RingCache:
  """Keys and values of N layers; slot j holds a position p with p mod W = j.

  Attributes:
    k, v: rotated keys, and values, [N, B, HKV, W, D].
    positions: position of the token in each slot [N, B, W], -1 where empty.
    next_position: position of the next token [N, B].
  """

  # Any: tree transformations build caches of other things than arrays.
  k: Any
  v: Any
  positions: Any
  next_position: Any


@struct.dataclass
class KVCache:
  """Keys and values of N layers; slot j holds the token at position j.

  Attributes:
    k, v: rotated keys, and values, [N, B, HKV, S, D] with S = max_length.
    next_position: position of the next token [N, B]: slots in use.
  """

  k: Any
  v: Any
  next_position: Any


@struct.dataclass
class CacheLayer:
  """One layer's part of a RingCache or KVCache, which stays whole.

  Attributes:
    cache: of all layers.
    layer: which of them.
  """

  cache: Any
  layer: Any

  @property
  def next_position(self) -> Any:
    """Position of the next token [B]."""
    return self.cache.next_position[self.layer]

  @property
  def held(self) -> Any:
    """Position of the token in each slot [B, S], -1 where empty."""
    if isinstance(self.cache, RingCache):
      return self.cache.positions[self.layer]
    slot = jnp.arange(self.cache.k.shape[3], dtype=jnp.int32)[None]
    return jnp.where(slot < self.next_position[:, None], slot, -1)


def init_ring_cache(
  layers: int, batch_size: int, heads: int, window: int, channels: int, dtype
) -> RingCache:
  """An empty ring."""
  shape = (layers, batch_size, heads, window, channels)
  return RingCache(
    k=jnp.zeros(shape, dtype),
    v=jnp.zeros(shape, dtype),
    positions=jnp.full((layers, batch_size, window), -1, jnp.int32),
    next_position=jnp.zeros((layers, batch_size), jnp.int32),
  )


def init_kv_cache(
  layers: int, batch_size: int, heads: int, slots: int, channels: int, dtype
) -> KVCache:
  """An empty cache of so many slots."""
  shape = (layers, batch_size, heads, slots, channels)
  return KVCache(
    k=jnp.zeros(shape, dtype),
    v=jnp.zeros(shape, dtype),
    next_position=jnp.zeros((layers, batch_size), jnp.int32),
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
  """Attention of new tokens to the cache and to each other.

  Args:
    part: what has been seen.
    q: rotated queries of T new tokens [B, T, HQ, D].
    k: their rotated keys [B, T, HKV, D].
    v: their values.
    runs: [B, T], 1 for tokens that continue the cache, 2, 3, ... for those of
      later documents, 0 for padding; None for 1.
    positions: [B, T].
    window: tokens a query sees, None for all.

  Returns:
    o [B, T, HQ, D], and the cache after the tokens, which holds the last run
    only, and of that what a KVCache has slots for.
  """
  cache, layer = part.cache, part.layer
  S = cache.k.shape[3]
  all_runs = jnp.ones_like(positions) if runs is None else runs
  end, in_last = _last_run(all_runs, positions, part.next_position)
  if isinstance(cache, RingCache):
    kept, slots = in_last & (positions >= end[:, None] - S), positions % S
  else:
    kept, slots = in_last & (positions < S), positions
  # Slots beyond the cache are dropped, which is how a token is not stored.
  nowhere = S + jnp.arange(positions.shape[1], dtype=jnp.int32)[None]
  slots = jnp.where(kept, slots, nowhere)
  o, new_k, new_v = cached_attention(
    q,
    k,
    v,
    cache.k,
    cache.v,
    layer=layer,
    held=part.held,
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
  """Tokens of the next T that a cache has no slot for: [B, T]; None: none."""
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
  """Runs [B, T] (from 1, 0 of padding, None without ids) and positions."""
  if segment_ids is None:
    return None, first[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
  runs = jnp.where(segment_ids != 0, reset_counts(segment_ids) + 1, 0)
  return runs, segment_positions(segment_ids, first)


def _last_run(runs, positions, next_position):
  """Next position [B] after the tokens, and which are of the last run."""
  number = runs.max(axis=1, keepdims=True)  # 0: nothing but padding
  in_last = (runs == number) & (runs > 0)
  end = jnp.where(in_last, positions + 1, 0).max(axis=1)
  return jnp.where(number[:, 0] > 0, end, next_position), in_last


def _ring_positions(part, runs, positions, slots):
  """Positions in all slots of all layers once the tokens are stored."""
  held = part.cache.positions
  if runs is not None:  # a new document leaves nothing of the one before
    restarted = runs.max(axis=1, keepdims=True) > 1
    held = held.at[part.layer].set(jnp.where(restarted, -1, part.held))
  rows = jnp.arange(positions.shape[0])[:, None]
  return held.at[part.layer, rows, slots].set(
    positions, mode="drop", unique_indices=True
  )
