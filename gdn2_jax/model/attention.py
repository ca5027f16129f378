"""Causal softmax attention with rotary positions: sliding-window, or full.

With a window, the cache holds the keys and values of the last `window` tokens
in slots position mod window, so its size never grows. Without, it is a KVCache,
which holds those of every token. Keys are stored rotated.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from gdn2_jax.model.kv_cache import KVCacheLayer, attend_and_store, last_run
from gdn2_jax.model.layers import Linear, fan_in_uniform
from gdn2_jax.model.shards import length_axis, on_shards
from gdn2_jax.ops.attention import attention_step, sliding_window_attention
from gdn2_jax.ops.context import attention_context
from gdn2_jax.ops.context_borders import runs_and_positions
from gdn2_jax.ops.rope import apply_rope
from gdn2_jax.ops.segments import reset_counts, segment_positions
from gdn2_jax.typing import Activations, SegmentIds

# Logical names, for shards of tokens.
_TOKENS = ("batch", "length", "heads", None)
_KV_TOKENS = ("batch", "length", "kv_heads", None)


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class AttentionConfig:
  """Causal softmax attention, of the layers "S" and "A".

  Attributes:
    num_heads: query heads.
    num_kv_heads: key and value heads, a divisor of num_heads; 0 means
      num_heads.
    head_dim: channels of a head, even.
    window: tokens a query sees, itself included, in the layers "S".
    rope_base: base of the rotary frequencies.
    implementation: "" takes the best that supports the call; "xla", "cudnn".
  """

  num_heads: int = 18
  num_kv_heads: int = 0
  head_dim: int = 128
  window: int = 2048
  rope_base: float = 10000.0
  implementation: str = ""

  @property
  def kv_heads(self) -> int:
    """Key and value heads."""
    return self.num_kv_heads or self.num_heads

  def validate(self, path: str) -> None:
    """Raises ValueError naming the first field under `path` that is wrong."""
    for name in ("num_heads", "window"):
      if getattr(self, name) < 1:
        raise ValueError(f"{path}.{name}={getattr(self, name)}: expected >= 1")
    if self.num_heads % self.kv_heads:
      raise ValueError(
        f"{path}.num_kv_heads={self.num_kv_heads}: expected a divisor of "
        f"num_heads={self.num_heads}, or 0"
      )
    if self.head_dim < 2 or self.head_dim % 2:
      raise ValueError(
        f"{path}.head_dim={self.head_dim}: expected an even number >= 2"
      )
    if self.rope_base <= 1:
      raise ValueError(f"{path}.rope_base={self.rope_base}: expected > 1")
    if self.implementation not in ("", "xla", "cudnn"):
      raise ValueError(
        f"{path}.implementation={self.implementation!r}: expected '', 'xla' "
        "or 'cudnn'"
      )


@struct.dataclass
class AttentionCache:
  """Keys and values of the last W = window tokens, in slots position mod W.

  Attributes:
    k, v: rotated keys, and values, [B, W, HKV, D].
    positions: position of the token in each slot [B, W], -1 where empty.
    next_position: position of the next token [B].
  """

  # Any: tree transformations build caches of other things than arrays.
  k: Any
  v: Any
  positions: Any
  next_position: Any


def init_attention_cache(
  config: AttentionConfig, batch_size: int, dtype
) -> AttentionCache:
  """An empty ring."""
  c = config
  shape = (batch_size, c.window, c.kv_heads, c.head_dim)
  return AttentionCache(
    k=jnp.zeros(shape, dtype),
    v=jnp.zeros(shape, dtype),
    positions=jnp.full((batch_size, c.window), -1, jnp.int32),
    next_position=jnp.zeros((batch_size,), jnp.int32),
  )


class AttentionMixer(nn.Module):
  """x [B, T, D] -> y [B, T, D] through causal softmax attention.

  Attributes:
    config: heads, positions and window.
    num_layers: of the model, for the initial size of the output projection.
    full: every query sees all tokens before it, whatever config.window is.
    dtype: of activations.
    param_dtype: of the parameters.
  """

  config: AttentionConfig
  num_layers: int
  full: bool = False
  dtype: str = "float32"
  param_dtype: str = "float32"

  @nn.compact
  def __call__(
    self,
    x: Activations,
    segment_ids: SegmentIds | None = None,
    cache: AttentionCache | KVCacheLayer | None = None,
  ) -> tuple[Activations, AttentionCache | KVCacheLayer | None]:
    c = self.config
    q = self._project("q_proj", c.num_heads, "heads")(x)
    k = self._project("k_proj", c.kv_heads, "kv_heads")(x)
    v = self._project("v_proj", c.kv_heads, "kv_heads")(x)
    axis = None
    if cache is None:
      axis = length_axis((q, _TOKENS), (k, _KV_TOKENS))
    if axis is None:
      o, cache = self._mix(q, k, v, segment_ids, cache)
    else:
      o = self._mix_on_shards(q, k, v, segment_ids, axis)
    y = Linear(
      (x.shape[-1],),
      ("heads", "head_dim", "embed"),
      fan_in_uniform(1.0 / math.sqrt(2.0 * self.num_layers), 2),
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name="o_proj",
    )(o)
    return y, cache

  def _mix(self, q, k, v, segment_ids, cache):
    """Attention of whole rows; the new cache if there was one."""
    c = self.config
    runs, positions = _runs_and_positions(q, segment_ids, cache)
    q = apply_rope(q, positions, base=c.rope_base)
    k = apply_rope(k, positions, base=c.rope_base)

    if cache is None:
      o = self._attend(q, k, v, runs, runs)
    elif self.full:
      o, cache = attend_and_store(cache, q, k, v, runs, positions)
    elif q.shape[1] == 1 and segment_ids is None:
      cache = _write(cache, k, v, jnp.ones_like(positions), positions)
      # Every slot is within the window: the new token overwrote the oldest.
      o = attention_step(q[:, 0], cache.k, cache.v, cache.positions >= 0)
      o = o[:, None]
    else:
      runs = jnp.ones_like(positions) if runs is None else runs
      k_past, v_past, past_runs = _chronological(cache)
      o = self._attend(
        q,
        jnp.concatenate([k_past, k], axis=1),
        jnp.concatenate([v_past, v], axis=1),
        runs,
        jnp.concatenate([past_runs, runs], axis=1),
      )
      cache = _write(cache, k, v, runs, positions)
    return o, cache

  def _mix_on_shards(self, q, k, v, segment_ids, axis):
    """The same without a cache, on tokens that are split over devices."""
    c = self.config
    if segment_ids is None:
      segment_ids = jnp.ones(q.shape[:2], jnp.int32)

    def run(q, k, v, segment_ids):
      runs, positions = runs_and_positions(segment_ids, axis_name=axis)
      return attention_context(
        apply_rope(q, positions, base=c.rope_base),
        apply_rope(k, positions, base=c.rope_base),
        v,
        axis_name=axis,
        window=self._window,
        segment_ids=runs,
        implementation=c.implementation or None,
      )

    into = (_TOKENS, _KV_TOKENS, _KV_TOKENS, ("batch", "length"))
    return on_shards(run, into, _TOKENS)(q, k, v, segment_ids)

  @property
  def _window(self):
    return None if self.full else self.config.window

  def _project(self, name, heads, axis):
    return Linear(
      (heads, self.config.head_dim),
      ("embed", axis, "head_dim"),
      fan_in_uniform(),
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name=name,
    )

  def _attend(self, q, k, v, q_runs, kv_runs):
    return sliding_window_attention(
      q,
      k,
      v,
      window=self._window,
      q_segment_ids=q_runs,
      kv_segment_ids=kv_runs,
      implementation=self.config.implementation or None,
    )


def _runs_and_positions(x, segment_ids, cache):
  """Ids of runs (from 1, 0 padding; None without segments) and positions."""
  batch, length = x.shape[:2]
  first = jnp.zeros((batch,), jnp.int32)
  if cache is not None:
    first = cache.next_position
  if segment_ids is None:
    return None, first[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
  runs = jnp.where(segment_ids != 0, reset_counts(segment_ids) + 1, 0)
  return runs, segment_positions(segment_ids, first)


def _chronological(cache):
  """The ring unrolled: keys, values and run ids (1, or 0 where empty)."""
  window = cache.k.shape[1]
  positions = cache.next_position[:, None] + jnp.arange(-window, 0)[None]
  slots = positions % window
  stored = jnp.take_along_axis(cache.positions, slots, axis=1)
  held = (stored == positions) & (positions >= 0)
  gather = slots[:, :, None, None]
  return (
    jnp.take_along_axis(cache.k, gather, axis=1),
    jnp.take_along_axis(cache.v, gather, axis=1),
    held.astype(jnp.int32),
  )


def _write(cache, k, v, runs, positions):
  """The cache after the tokens with runs > 0; only the last run remains."""
  window = cache.k.shape[1]
  end, in_last = last_run(runs, positions, cache.next_position)
  keep = in_last & (positions >= end[:, None] - window)
  # Slots beyond the ring are dropped, which is how a token is not written.
  slots = jnp.where(keep, positions % window, window)
  rows = jnp.arange(k.shape[0])[:, None]
  restarted = runs.max(axis=1, keepdims=True) > 1
  held = jnp.where(restarted, -1, cache.positions)
  return AttentionCache(
    k=cache.k.at[rows, slots].set(k.astype(cache.k.dtype), mode="drop"),
    v=cache.v.at[rows, slots].set(v.astype(cache.v.dtype), mode="drop"),
    positions=held.at[rows, slots].set(positions, mode="drop"),
    next_position=end,
  )
