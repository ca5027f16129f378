"""A small model of two layers that reads bytes, and its page."""

import functools

from gdn2_jax.data.tokenizer.api import BytesTokenizer
from gdn2_jax.interop.folder import Model
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.mixers.gdn2 import GDN2Config
from tests.random_params import random_params

TEXT = "Two <b> & gates,\none head."


@functools.cache
def byte_model(pattern: str = "G") -> Model:
  """Random parameters; two heads of 16 x 16 in each of two layers."""
  config = ModelConfig(
    vocab_size=259,
    model_dim=32,
    num_layers=2,
    pattern=pattern,
    gdn2=GDN2Config(
      num_heads=2, key_dim=16, value_dim=16, implementation="reference"
    ),
    mlp_dim=24,
    dtype="float32",
  )
  return Model(config, random_params(config), BytesTokenizer())
