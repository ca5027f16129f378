"""Pre-norm residual layers, and groups of layers that a scan repeats."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.layers import RMSNorm, SwiGLU
from gdn2_jax.model.mixers.layer_cache import CacheLayer
from gdn2_jax.model.mixers.registry import kind_of
from gdn2_jax.typing import Activations, SegmentIds


def init_mixer_cache(
  letter: str, config: ModelConfig, batch_size: int, max_length: int | None
) -> Any:
  """Empty cache of the layers at one place of the pattern, in all groups.

  Leaves are [groups, B, ...]. Only kinds whose cache grows need max_length.
  """
  cache = kind_of(letter).init_cache(config, batch_size, max_length)
  groups = config.num_groups
  return jax.tree.map(
    lambda a: jnp.broadcast_to(a[None], (groups, *a.shape)).copy(), cache
  )


class Block(nn.Module):
  """Residual layer: x += mixer(norm(x)), then x += mlp(norm(x))."""

  letter: str
  config: ModelConfig

  @nn.compact
  def __call__(
    self, x: Activations, segment_ids: SegmentIds | None, cache: Any
  ) -> tuple[Activations, Any]:
    c = self.config
    types = {"dtype": c.dtype, "param_dtype": c.param_dtype}
    norm = RMSNorm(c.norm_eps, c.param_dtype, name="mixer_norm")
    mixer = kind_of(self.letter).make(c, name="mixer", **types)
    y, cache = mixer(norm(x), segment_ids, cache)
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
    for i, letter in enumerate(self.config.pattern):
      block = Block(letter, self.config, name=f"layer_{i}")
      if caches is None:
        x, _ = block(x, segment_ids, None)
        continue
      # Caches are a scan's carry and not its inputs and outputs, which would be
      # two arrays and a copy.
      part = CacheLayer(caches[i], index)
      if kind_of(letter).is_indexed:
        x, part = block(x, segment_ids, part)
      else:
        x, new = block(x, segment_ids, part.read())
        part = part.write(new)
      caches[i] = part.cache
    return (x, None if caches is None else tuple(caches)), None


def _constrain(x):
  return nn.with_logical_constraint(x, ("batch", "length", "act_embed"))
