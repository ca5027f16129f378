"""Pre-norm residual layer, and the group of layers that a scan repeats."""

from typing import Any

from flax import linen as nn

from gdn2_jax.model.attention import AttentionMixer, init_attention_cache
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.gdn2 import GDN2Mixer, init_gdn2_cache
from gdn2_jax.model.layers import RMSNorm, SwiGLU
from gdn2_jax.typing import Activations, SegmentIds


def make_mixer(kind: str, config: ModelConfig) -> nn.Module:
  """The mixer of a layer of this kind, named "mixer"."""
  types = {"dtype": config.dtype, "param_dtype": config.param_dtype}
  match kind:
    case "G":
      return GDN2Mixer(config.gdn2, name="mixer", **types)
    case "S":
      return AttentionMixer(
        config.attention, config.num_layers, name="mixer", **types
      )
  raise AssertionError(kind)


def init_mixer_cache(kind: str, config: ModelConfig, batch_size: int) -> Any:
  """The empty cache of a layer of this kind."""
  match kind:
    case "G":
      return init_gdn2_cache(config.gdn2, batch_size, config.dtype)
    case "S":
      return init_attention_cache(config.attention, batch_size, config.dtype)
  raise AssertionError(kind)


class Block(nn.Module):
  """x += mixer(norm(x)); x += mlp(norm(x))."""

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
  """One repetition of the pattern: layer_0, layer_1, ..."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self, x: Activations, segment_ids: SegmentIds | None, caches: Any
  ) -> tuple[Activations, Any]:
    pattern = self.config.pattern
    caches = (None,) * len(pattern) if caches is None else caches
    new = []
    for i, (kind, cache) in enumerate(zip(pattern, caches, strict=True)):
      x, cache = Block(kind, self.config, name=f"layer_{i}")(
        x, segment_ids, cache
      )
      new.append(cache)
    return x, None if new[0] is None else tuple(new)


def _constrain(x):
  return nn.with_logical_constraint(x, ("batch", "length", "act_embed"))
