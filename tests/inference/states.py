"""States of random bits, and their comparison."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from gdn2_jax.inference.identity import Identity, identify
from gdn2_jax.inference.state import State, init_state
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.mixers.attention import AttentionConfig
from gdn2_jax.model.mixers.gdn2 import GDN2Config
from tests.random_params import random_params

CONFIG = ModelConfig(
  vocab_size=61,
  model_dim=32,
  num_layers=4,
  pattern="GS",
  gdn2=GDN2Config(num_heads=2, key_dim=16, value_dim=16),
  attention=AttentionConfig(num_heads=2, head_dim=16, window=8),
  mlp_dim=48,
  dtype="bfloat16",  # another one than that of the recurrent states
)


class Words:
  """The part of a tokenizer that state files use."""

  sha256 = "5e" * 32


class Model:
  """A config, random parameters and their identity."""

  def __init__(self, pattern: str):
    self.config = dataclasses.replace(
      CONFIG,
      dtype="float32",
      pattern=pattern,
      num_layers=len(pattern),
      # The token scan compiles several times faster than the chunks.
      gdn2=dataclasses.replace(CONFIG.gdn2, implementation="reference"),
    )
    self.params = random_params(self.config)
    self.identity = identify(self.params, self.config)


@functools.cache
def make_model(pattern: str) -> Model:
  """The same model for all tests, so that programs compile once."""
  return Model(pattern)


@functools.cache
def identity() -> Identity:
  """Identity of CONFIG with random weights."""
  return identify(random_params(CONFIG), CONFIG, Words())


def random_state(batch_size: int, seed: int = 0) -> State:
  """A state with every bit drawn, NaN, infinities and -0 among them."""
  rng = np.random.default_rng(seed)

  def draw(x):
    bits = rng.bytes(x.size * x.dtype.itemsize)
    return jnp.asarray(np.frombuffer(bits, x.dtype).reshape(x.shape))

  state = jax.tree.map(draw, _shapes(batch_size))
  # A position is a number of tokens: never negative.
  return state.replace(position=state.position & 0x7FFFFFFF)


@functools.cache
def _shapes(batch_size):
  return jax.eval_shape(lambda: init_state(CONFIG, batch_size))


def assert_equal(got, want):
  """Compares structure, dtypes, shapes and bits."""
  got, want = jax.device_get((got, want))
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert a.tobytes() == b.tobytes()
