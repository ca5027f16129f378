"""The cache of full softmax attention: keys and values of every token.

Its capacity is fixed when it is made. All layers of a kind share one array and
each works on its own part of it in place, so that a decoding step moves the
keys and values it reads and not the whole cache.
"""

from typing import Any

import jax.numpy as jnp
from flax import struct

from gdn2_jax.ops.attention_cached import cached_attention


@struct.dataclass
class KVCache:
  """Keys and values of N layers; slot j holds the token at position j.

  Attributes:
    k, v: rotated keys, and values, [N, B, HKV, S, D] with S = max_length.
    next_position: position of each layer's next token [N, B].
  """

  # Any: tree transformations build caches of other things than arrays.
  k: Any
  v: Any
  next_position: Any


@struct.dataclass
class KVCacheLayer:
  """One layer's part of a KVCache, which stays whole.

  Attributes:
    cache: of all layers.
    layer: which of them.
  """

  cache: KVCache
  layer: Any

  @property
  def next_position(self) -> Any:
    """Position of the next token [B]."""
    return self.cache.next_position[self.layer]


def init_kv_cache(
  layers: int,
  batch_size: int,
  heads: int,
  max_length: int,
  channels: int,
  dtype,
) -> KVCache:
  """An empty cache."""
  shape = (layers, batch_size, heads, max_length, channels)
  return KVCache(
    k=jnp.zeros(shape, dtype),
    v=jnp.zeros(shape, dtype),
    next_position=jnp.zeros((layers, batch_size), jnp.int32),
  )


def attend_and_store(
  part: KVCacheLayer, q: Any, k: Any, v: Any, runs: Any, positions: Any
) -> tuple[Any, KVCacheLayer]:
  """Attention of new tokens to the cache and to each other.

  Args:
    part: what has been seen.
    q: rotated queries of T new tokens [B, T, HQ, D].
    k: their rotated keys [B, T, HKV, D].
    v: their values.
    runs: [B, T], 1 for tokens that continue the cache, 2, 3, ... for those of
      later documents, 0 for padding; None for 1.
    positions: [B, T].

  Returns:
    o [B, T, HQ, D], NaN for a token beyond the capacity, and the cache after
    the tokens, which holds the last run only.
  """
  cache = part.cache
  capacity = cache.k.shape[3]
  all_runs = jnp.ones_like(positions) if runs is None else runs
  end, kept = last_run(all_runs, positions, part.next_position)
  # Slots beyond the cache are dropped, which is how a token is not stored.
  nowhere = capacity + jnp.arange(positions.shape[1], dtype=jnp.int32)[None]
  o, new_k, new_v = cached_attention(
    q,
    k,
    v,
    cache.k,
    cache.v,
    layer=part.layer,
    lengths=jnp.minimum(part.next_position, capacity),
    slots=jnp.where(kept & (positions < capacity), positions, nowhere),
    segment_ids=runs,
  )
  lost = (positions >= capacity) & (all_runs > 0)
  o = jnp.where(lost[:, :, None, None], jnp.nan, o)
  cache = KVCache(
    k=new_k,
    v=new_v,
    next_position=cache.next_position.at[part.layer].set(end),
  )
  return o, part.replace(cache=cache)


def last_run(runs: Any, positions: Any, next_position: Any) -> tuple[Any, Any]:
  """Where the last run ends, and which tokens are of it.

  Args:
    runs: [B, T], 0 for padding.
    positions: [B, T].
    next_position: [B], of the token after the cache.

  Returns:
    The next position [B] after the tokens, and a mask [B, T].
  """
  number = runs.max(axis=1, keepdims=True)  # 0: nothing but padding
  in_last = (runs == number) & (runs > 0)
  end = jnp.where(in_last, positions + 1, 0).max(axis=1)
  return jnp.where(number[:, 0] > 0, end, next_position), in_last
