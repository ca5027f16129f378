"""Pre-norm residual layers, and groups of layers that a scan repeats."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.layers import RMSNorm, SwiGLU
from gdn2_jax.model.mixers.attention import AttentionMixer
from gdn2_jax.model.mixers.gdn2 import GDN2Mixer, init_gdn2_cache
from gdn2_jax.model.mixers.kv_cache import CacheLayer, init_kv_cache
from gdn2_jax.typing import Activations, SegmentIds


def make_mixer(kind: str, config: ModelConfig) -> nn.Module:
  """Creates the mixer of a layer kind, named "mixer"."""
  types = {"dtype": config.dtype, "param_dtype": config.param_dtype}
  match kind:
    case "G":
      return GDN2Mixer(config.gdn2, name="mixer", **types)
    case "S" | "A":
      return AttentionMixer(
        config.attention,
        config.num_layers,
        full=kind == "A",
        name="mixer",
        **types,
      )
  raise AssertionError(kind)


def init_mixer_cache(
  kind: str, config: ModelConfig, batch_size: int, max_length: int | None
) -> Any:
  """Empty cache of the layers at one position of the pattern, in all groups.

  Leaves are [groups, B, ...]. Only "A" needs max_length.
  """
  groups = config.num_groups
  if kind == "G":
    cache = init_gdn2_cache(config.gdn2, batch_size, config.dtype)
    return jax.tree.map(
      lambda a: jnp.broadcast_to(a[None], (groups, *a.shape)).copy(), cache
    )
  c, ring = config.attention, kind == "S"
  slots = c.window if ring else max_length
  shape = (groups, batch_size, c.kv_heads, slots, c.head_dim)
  return init_kv_cache(shape, config.dtype, ring=ring)


def _layer_of(kind, cache, index):
  """One layer's part of the cache of all groups."""
  if kind != "G":
    return CacheLayer(cache, index)
  return jax.tree.map(
    lambda a: lax.dynamic_index_in_dim(a, index, keepdims=False), cache
  )


def _with_layer(kind, cache, index, new):
  """Stores a layer's new cache in the cache of all groups, in place under jit.

  Caches are a scan's carry and not its inputs and outputs, which would be two
  arrays and a copy.
  """
  if kind != "G":
    return new.cache
  return jax.tree.map(
    lambda a, b: lax.dynamic_update_index_in_dim(
      a, b.astype(a.dtype), index, 0
    ),
    cache,
    new,
  )


class Block(nn.Module):
  """Residual layer: x += mixer(norm(x)), then x += mlp(norm(x))."""

  kind: str
  config: ModelConfig

  @nn.compact
  def __call__(
    self, x: Activations, segment_ids: SegmentIds | None, cache: Any
  ) -> tuple[Activations, Any]:
    c = self.config
    types = {"dtype": c.dtype, "param_dtype": c.param_dtype}
    norm = RMSNorm(c.norm_eps, c.param_dtype, name="mixer_norm")
    y, cache = make_mixer(self.kind, c)(norm(x), segment_ids, cache)
    x = _constrain(x + y)
    norm = RMSNorm(c.norm_eps, c.param_dtype, name="mlp_norm")
    y = SwiGLU(c.mlp_dim, c.num_layers, name="mlp", **types)(norm(x))
    return _constrain(x + y), cache


class Group(nn.Module):
  """One repetition of the pattern, with layers layer_0, layer_1, ..."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    carry: tuple[Activations, Any],
    segment_ids: SegmentIds | None,
    index: Any,
  ) -> tuple[tuple[Activations, Any], None]:
    """Runs the group; the carry is activations and all groups' caches."""
    x, caches = carry
    caches = None if caches is None else list(caches)
    for i, kind in enumerate(self.config.pattern):
      block = Block(kind, self.config, name=f"layer_{i}")
      if caches is None:
        x, _ = block(x, segment_ids, None)
      else:
        part = _layer_of(kind, caches[i], index)
        x, part = block(x, segment_ids, part)
        caches[i] = _with_layer(kind, caches[i], index, part)
    return (x, None if caches is None else tuple(caches)), None


def _constrain(x):
  return nn.with_logical_constraint(x, ("batch", "length", "act_embed"))
