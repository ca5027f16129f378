"""Linen modules as NNX modules with plain parameters.

  from gdn2_jax.nnx import GDN2

  layer = GDN2(GDN2Config(num_heads=2), model_dim=256, rngs=nnx.Rngs(0))
  y, _ = layer(x)

Parameters are `nnx.Param`s that work in `nnx.jit`, `nnx.grad` and
`nnx.Optimizer`; the axis names of linen, which NNX would need a mesh for, are
left out.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from gdn2_jax.model.mixers.gdn2 import GDN2Cache, GDN2Mixer, init_gdn2_cache
from gdn2_jax.model.mixers.gdn2_config import GDN2Config
from gdn2_jax.typing import Activations, SegmentIds


def to_nnx(
  module: nn.Module, *example: Any, rngs: nnx.Rngs
) -> nnx.bridge.ToNNX:
  """An NNX module with the parameters and the call of a linen module.

  Args:
    module: linen module, such as LM(config).
    *example: arguments of a call, arrays or `jax.ShapeDtypeStruct`s; only their
      shapes and dtypes matter.
    rngs: its stream "params" draws the parameters.
  """
  model = nnx.bridge.ToNNX(module)
  _set_parameters(model, example, rngs)
  return model


def _set_parameters(model: nnx.bridge.ToNNX, example, rngs: nnx.Rngs) -> None:
  """Draws the parameters of a bridge to linen, without their boxes."""
  # `lazy_init` would make variables with axis names out of the boxes. NNX
  # places such variables on a mesh as they are made, and raises without one.
  init = jax.jit(lambda key, *a: nn.unbox(model.to_nnx__module.init(key, *a)))
  zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), example)
  params = init(rngs.params(), *zeros)["params"]
  for name, value in jax.tree.map(nnx.Param, params).items():
    setattr(model, name, nnx.data(value))


class GDN2(nnx.bridge.ToNNX):
  """Gated DeltaNet-2 layer as an NNX module, x [B, T, D] -> y [B, T, D].

  Args:
    config: the layer.
    model_dim: D.
    rngs: its stream "params" draws the parameters.
    dtype: dtype of activations and matrix products.
    param_dtype: dtype of the parameters.
    mixer: the linen layer: GDN2Mixer, or a subclass with gates of its own.
  """

  def __init__(
    self,
    config: GDN2Config,
    model_dim: int,
    *,
    rngs: nnx.Rngs,
    dtype: str = "float32",
    param_dtype: str = "float32",
    mixer: type[GDN2Mixer] = GDN2Mixer,
  ):
    config.validate("config")
    super().__init__(mixer(config, dtype=dtype, param_dtype=param_dtype))
    example = jax.ShapeDtypeStruct((1, 1, model_dim), dtype)
    _set_parameters(self, (example,), rngs)

  def __call__(
    self,
    x: Activations,
    segment_ids: SegmentIds | None = None,
    cache: GDN2Cache | None = None,
  ) -> tuple[Activations, GDN2Cache | None]:
    """Mixes T tokens per row; arguments and results are GDN2Mixer's."""
    return super().__call__(x, segment_ids, cache)

  def init_cache(self, batch_size: int) -> GDN2Cache:
    """Cache before the first token."""
    mixer = self.to_nnx__module
    return init_gdn2_cache(mixer.config, batch_size, mixer.dtype)
