"""Causal softmax attention with rotary positions: sliding-window, or full."""

import math

import jax.numpy as jnp
from flax import linen as nn

from gdn2_jax.config_class import config_class
from gdn2_jax.model.kv_cache import (
  CacheLayer,
  attend_and_store,
  runs_and_positions,
)
from gdn2_jax.model.layers import Linear, fan_in_uniform
from gdn2_jax.model.on_shards import length_axis, on_shards
from gdn2_jax.ops.attention.api import IMPLEMENTATIONS, sliding_window_attention
from gdn2_jax.ops.attention.rope import apply_rope
from gdn2_jax.ops.context import borders
from gdn2_jax.ops.context.api import attention_context
from gdn2_jax.typing import Activations, SegmentIds

# Logical names, for shards of tokens.
_TOKENS = ("batch", "length", "heads", None)
_KV_TOKENS = ("batch", "length", "kv_heads", None)


@config_class
class AttentionConfig:
  """Causal softmax attention, of the layers "S" and "A".

  Attributes:
    num_heads: query heads.
    num_kv_heads: key and value heads, a divisor of num_heads; 0 means
      num_heads.
    head_dim: channels of a head, even.
    window: tokens a query sees, itself included, in the layers "S".
    rope_base: base of the rotary frequencies.
    implementation: "" takes the best that supports the call; "xla", "cudnn",
      "mosaic_gpu".
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
    allowed = ("", *IMPLEMENTATIONS)
    if self.implementation not in allowed:
      raise ValueError(
        f"{path}.implementation={self.implementation!r}: expected one of "
        f"{allowed}"
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
    cache: CacheLayer | None = None,
  ) -> tuple[Activations, CacheLayer | None]:
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
    first = jnp.zeros(q.shape[:1], jnp.int32)
    if cache is not None:
      first = cache.next_position
    runs, positions = runs_and_positions(first, q.shape[1], segment_ids)
    q = apply_rope(q, positions, base=c.rope_base)
    k = apply_rope(k, positions, base=c.rope_base)
    if cache is not None:
      return attend_and_store(cache, q, k, v, runs, positions, self._window)
    o = sliding_window_attention(
      q,
      k,
      v,
      window=self._window,
      q_segment_ids=runs,
      kv_segment_ids=runs,
      implementation=c.implementation or None,
    )
    return o, None

  def _mix_on_shards(self, q, k, v, segment_ids, axis):
    """The same without a cache, on tokens that are split over devices."""
    c = self.config
    if segment_ids is None:
      segment_ids = jnp.ones(q.shape[:2], jnp.int32)

    def run(q, k, v, segment_ids):
      runs, positions = borders.runs_and_positions(segment_ids, axis_name=axis)
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
