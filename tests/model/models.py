"""Small models of every mixer kind, built once for the tests."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.lm import LM
from gdn2_jax.model.mixers.attention import AttentionConfig
from gdn2_jax.model.mixers.gdn2 import GDN2Config
from gdn2_jax.model.mixers.mamba2 import Mamba2Config
from gdn2_jax.model.mixers.mamba3 import Mamba3Config

PATTERNS = ("G", "S", "A")
# Special cases of "G", and what has tests of its own: in the slow suite.
RELATIVES = ("K", "D", "E", "M", "N")
MAX_LENGTH = 40  # of the caches of "A"


def small_gdn2(implementation: str) -> GDN2Config:
  """Two value heads to a key head."""
  return GDN2Config(
    num_heads=2,
    num_value_heads=4,
    key_dim=16,
    value_dim=24,
    implementation=implementation,
  )


def small_mamba(implementation: str) -> dict[str, Any]:
  """Configs of Mamba-2, and of Mamba-3 with two ranks, four heads each."""
  sizes = {"inner_dim": 64, "head_dim": 16, "state_dim": 16}
  sizes["implementation"] = implementation
  return {
    "mamba2": Mamba2Config(**sizes),
    "mamba3": Mamba3Config(mimo_rank=2, **sizes),
  }


def small_config(pattern: str = "GS", **changes) -> ModelConfig:
  """Two groups, grouped heads, a window far below the test's lengths.

  The op is the token scan, which compiles in half the time of the chunkwise
  form; what depends on that one asks for it by `gdn2`.
  """
  fields = {
    "vocab_size": 61,
    "model_dim": 32,
    "num_layers": 2 * len(pattern),
    "pattern": pattern,
    "mlp_dim": 48,
    "gdn2": small_gdn2("reference"),
    **small_mamba("reference"),
    "attention": AttentionConfig(
      num_heads=4, num_kv_heads=2, head_dim=8, window=7
    ),
    "dtype": "float32",
    "loss_chunk": 16,
  }
  return ModelConfig(**(fields | changes))


def small_model(pattern: str = "GS", implementation: str = "reference"):
  """(model, params, jitted apply) of `small_config`, always the same."""
  return _small_model(pattern, implementation)


@functools.cache
def _small_model(pattern, implementation):
  mixers = {"gdn2": small_gdn2(implementation), **small_mamba(implementation)}
  model = LM(small_config(pattern, **mixers))
  tokens = jnp.zeros((1, 4), jnp.int32)
  params = nn.unbox(jax.jit(model.init)(jax.random.key(0), tokens))["params"]

  @jax.jit
  def apply(tokens, segment_ids=None, cache=None):
    return model.apply({"params": params}, tokens, segment_ids, cache)

  return model, params, apply


def tokens_of(batch: int, length: int, seed: int = 1):
  """Random tokens [batch, length]."""
  return jax.random.randint(jax.random.key(seed), (batch, length), 0, 61)
