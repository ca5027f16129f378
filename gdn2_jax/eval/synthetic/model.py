"""Small models of the synthetic suite, equal in parameters across mixers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from gdn2_jax.eval.synthetic.mixers import Sizes, model_config
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.layers import (
  Embedding,
  RMSNorm,
  SwiGLU,
  fan_in_uniform,
  parameter,
)
from gdn2_jax.model.mixers.registry import kind_of

REFERENCE_MIXER = "gdn2"  # parameters of the others are matched to it


class SuiteModel(nn.Module):
  """Embedding, residual layers, norm and head.

  Attributes:
    config: Mixers and widths; its mlp_dim is not used.
    mlp_dim: Hidden width of the MLPs; 0: layers have none.
    param_dtype: Dtype of the parameters.
  """

  config: ModelConfig
  mlp_dim: int
  param_dtype: str = "float32"

  @nn.compact
  def __call__(
    self,
    tokens: Int[Array, "B T *pair"],
    caches: tuple[Any, ...] | None = None,
    last: int | None = None,
  ) -> tuple[Float[Array, "B L VOCAB"], tuple[Any, ...] | None]:
    """Logits of the `last` steps (None: of all), and the new caches.

    Tokens are [B, T], or [B, T, 2] for a key and a value per step, whose
    embeddings are added.
    """
    c = self.config
    embed = {"vocab_size": c.vocab_size, "model_dim": c.model_dim}
    if tokens.ndim == 3:
      x = Embedding(**embed, name="key_embed")(tokens[..., 0])
      x = x + Embedding(**embed, name="value_embed")(tokens[..., 1])
    else:
      x = Embedding(**embed, name="embed")(tokens)
    new = []
    for i in range(c.num_layers):
      letter = c.pattern[i % len(c.pattern)]
      mixer = kind_of(letter).make(
        c, name=f"mixer_{i}", dtype=c.dtype, param_dtype=c.param_dtype
      )
      h = RMSNorm(c.norm_eps, name=f"mixer_norm_{i}")(x)
      y, cache = mixer(h, None, None if caches is None else caches[i])
      new.append(cache)
      x = x + y
      if self.mlp_dim:
        h = RMSNorm(c.norm_eps, name=f"mlp_norm_{i}")(x)
        x = x + SwiGLU(self.mlp_dim, c.num_layers, name=f"mlp_{i}")(h)
    if last is not None:
      x = x[:, -last:]
    x = RMSNorm(c.norm_eps, name="final_norm")(x)
    head = parameter(
      self,
      "head",
      fan_in_uniform(),
      ("embed", "vocab"),
      (c.model_dim, c.vocab_size),
    )
    return x @ head, None if caches is None else tuple(new)


def init_params(model: SuiteModel, key: jax.Array, paired: bool) -> Any:
  """Initial parameters; those of one name and shape are equal for one key.

  A draw depends on the key and the parameter's path, not on the mixer.
  """
  tokens = jnp.zeros((1, 2, 2) if paired else (1, 2), jnp.int32)
  return nn.unbox(model.init(key, tokens)["params"])


def count_parameters(model: SuiteModel, paired: bool) -> int:
  """Number of parameters; nothing is allocated."""
  shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0), paired))
  return sum(x.size for x in jax.tree.leaves(shapes))


def build(name: str, sizes: Sizes, vocab_size: int, paired: bool) -> SuiteModel:
  """Model of a named mixer, its MLP as wide as equal parameters allow.

  Raises:
    ValueError: The name or a size is wrong.
  """
  model = SuiteModel(model_config(name, sizes, vocab_size), sizes.mlp_dim)
  if name == REFERENCE_MIXER or not sizes.mlp_dim:
    return model
  reference = SuiteModel(
    model_config(REFERENCE_MIXER, sizes, vocab_size), sizes.mlp_dim
  )
  goal = count_parameters(reference, paired)
  here = count_parameters(model, paired)
  per_column = 3 * sizes.model_dim * sizes.num_layers
  width = sizes.mlp_dim + round((goal - here) / per_column)
  if width < 1:
    raise ValueError(
      f"mlp_dim={sizes.mlp_dim}: mixer {name!r} has {here - goal} parameters"
      f" more than {REFERENCE_MIXER!r}; expected a width that can make up for"
      " them"
    )
  return dataclasses.replace(model, mlp_dim=width)


def init_caches(
  config: ModelConfig, batch_size: int, length: int
) -> tuple[Any, ...]:
  """Empty caches of all layers, for at most `length` steps."""
  caches = []
  for i in range(config.num_layers):
    kind = kind_of(config.pattern[i % len(config.pattern)])
    caches.append(kind.init_cache(config, batch_size, length))
  return tuple(caches)
