"""Random parameters of a language model without compiling its initializers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.lm import LM


def random_params(config: ModelConfig, seed: int = 0) -> Any:
  """Parameters of sizes like a trained model's, every leaf random."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    match name.rsplit("/")[-1]:
      case "A_log":
        value = np.log(rng.uniform(1, 16, leaf.shape))
      case "dt_bias":
        value = rng.uniform(-6, -2, leaf.shape)
      case "weight" | "o_norm":
        value = rng.normal(1, 0.1, leaf.shape)
      case "table":
        value = rng.normal(0, 1, leaf.shape)
      case _:
        value = rng.normal(0, 0.2, leaf.shape)
    return jnp.asarray(value, leaf.dtype)

  tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  boxed = jax.eval_shape(LM(config).init, jax.random.key(0), tokens)
  abstract = nn.unbox(boxed)["params"]
  return jax.tree_util.tree_map_with_path(draw, abstract)
