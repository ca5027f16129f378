"""Tiny models of random weights, one for each pattern of mixers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.lm import LM
from gdn2_jax.model.mixers.attention import AttentionConfig
from gdn2_jax.model.mixers.gdn2 import GDN2Config
from tests.random_params import random_params

VOCAB = 61
WINDOW = 8
LENGTH = 24  # tokens of the longest sequence any test feeds


class Tiny:
  """A config, its parameters, tokens [3, LENGTH] and their exact logits."""

  def __init__(self, pattern: str):
    self.config = ModelConfig(
      vocab_size=VOCAB,
      model_dim=32,
      num_layers=len(pattern),
      pattern=pattern,
      gdn2=GDN2Config(
        num_heads=2,
        key_dim=16,
        value_dim=16,
        # "G" runs the default; the token scan compiles several times faster.
        implementation="" if pattern == "G" else "reference",
      ),
      attention=AttentionConfig(num_heads=2, head_dim=16, window=WINDOW),
      mlp_dim=48,
      dtype="float32",
    )
    rng = np.random.default_rng(0)
    self.tokens = rng.integers(0, VOCAB, (3, LENGTH), dtype=np.int32)
    self.params = random_params(self.config)
    self.logits = np.asarray(self.forward(self.params, self.tokens))

  @functools.cached_property
  def forward(self):
    """The full forward pass, jitted: params, tokens -> logits."""
    return jax.jit(lambda p, t: LM(self.config).apply({"params": p}, t)[0])


@functools.cache
def make_tiny(pattern: str) -> Tiny:
  return Tiny(pattern)


def damage_params(params, name: str, where=...):
  """The parameters with NaN at `where` of parameter `name`."""

  def spoil(path, x):
    here = jax.tree_util.keystr(path, simple=True, separator="/") == name
    return x.at[where].set(jnp.nan) if here else x

  return jax.tree_util.tree_map_with_path(spoil, params)


def damage_state(state, row: int):
  """The state with NaN in place of all floats of one row."""

  def spoil(x):
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    return x.at[:, row].set(jnp.nan) if is_float else x

  return state.replace(cache=jax.tree.map(spoil, state.cache))


@pytest.fixture(
  params=[*(pytest.param(p, marks=pytest.mark.deep) for p in "GS"), "GS"]
)
def tiny(request) -> Tiny:
  return make_tiny(request.param)


@pytest.fixture
def hybrid() -> Tiny:
  return make_tiny("GS")


@pytest.fixture
def attention() -> Tiny:
  """For tests that do not depend on the mixer: it compiles fastest."""
  return make_tiny("S")
