"""Causal softmax attention with rotary positions, windowed or full."""

import math
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from gdn2_jax.config_class import config_class
from gdn2_jax.model.layers import Linear, fan_in_uniform
from gdn2_jax.model.mixers.kv_cache import (
  attend_and_store,
  next_position,
  runs_and_positions,
)
from gdn2_jax.model.mixers.layer_cache import as_layer, like
from gdn2_jax.model.on_shards import on_shards
from gdn2_jax.ops.attention.api import IMPLEMENTATIONS, sliding_window_attention
from gdn2_jax.ops.attention.rope import apply_rope
from gdn2_jax.ops.context import borders
from gdn2_jax.typing import Activations, SegmentIds

# Logical axis names of the op's arrays, for on_shards.
_NAMES = {
  "q": ("batch", "length", "heads", None),
  "k": ("batch", "length", "kv_heads", None),
  "v": ("batch", "length", "kv_heads", None),
  "segment_ids": ("batch", "length"),
}


@config_class
class AttentionConfig:
  """Causal softmax attention, for layers "S" and "A".

  Attributes:
    num_heads: Query heads.
    num_kv_heads: Key and value heads, a divisor of num_heads; 0 means
      num_heads.
    head_dim: Channels of a head, even.
    window: Tokens that a query sees, its own included, in layers "S".
    rope_base: Base of the rotary frequencies.
    implementation: "xla", "cudnn" or "mosaic_gpu"; "" chooses one that supports
      the call.
  """

  num_heads: int = 18
  num_kv_heads: int = 0
  head_dim: int = 128
  window: int = 2048
  rope_base: float = 10000.0
  implementation: str = ""

  @property
  def kv_heads(self) -> int:
    """Number of key and value heads."""
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
  """Causal softmax attention layer, x [B, T, D] -> y [B, T, D].

  Attributes:
    config: Heads, positions and window.
    num_layers: Layers of the model; scales the initial output projection.
    full: Every query sees all earlier tokens; config.window is not used.
    dtype: Dtype of activations.
    param_dtype: Dtype of parameters.
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
    cache: Any = None,  # of one layer, or a CacheLayer
  ) -> tuple[Activations, Any]:
    c = self.config
    q = self._project("q_proj", c.num_heads, "heads")(x)
    k = self._project("k_proj", c.kv_heads, "kv_heads")(x)
    v = self._project("v_proj", c.kv_heads, "kv_heads")(x)
    if cache is None:
      attend = on_shards(self._attend, _NAMES, _NAMES["q"])
      o = attend(q=q, k=k, v=v, segment_ids=segment_ids)
    else:
      part = as_layer(cache)
      o, part = self._attend_and_store(q, k, v, segment_ids, part)
      cache = like(cache, part)
    y = Linear(
      (x.shape[-1],),
      ("heads", "head_dim", "embed"),
      fan_in_uniform(1.0 / math.sqrt(2.0 * self.num_layers), 2),
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name="o_proj",
    )(o)
    return y, cache

  def _attend(self, q, k, v, segment_ids=None, *, axis_name):
    """Attention of whole rows, or of this device's tokens of them."""
    if axis_name is None:
      first = jnp.zeros(q.shape[:1], jnp.int32)
      runs, positions = runs_and_positions(first, q.shape[1], segment_ids)
    else:
      if segment_ids is None:
        segment_ids = jnp.ones(q.shape[:2], jnp.int32)
      runs, positions = borders.runs_and_positions(
        segment_ids, axis_name=axis_name
      )
    return sliding_window_attention(
      *self._rotate(q, k, positions),
      v,
      window=self._window,
      q_segment_ids=runs,
      kv_segment_ids=runs,
      implementation=self.config.implementation or None,
      axis_name=axis_name,
    )

  def _attend_and_store(self, q, k, v, segment_ids, part):
    """Attention to the cache and to the new tokens; returns the new cache."""
    first = next_position(part)
    runs, positions = runs_and_positions(first, q.shape[1], segment_ids)
    q, k = self._rotate(q, k, positions)
    return attend_and_store(part, q, k, v, runs, positions, self._window)

  def _rotate(self, q, k, positions):
    base = self.config.rope_base
    return (apply_rope(x, positions, base=base) for x in (q, k))

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
