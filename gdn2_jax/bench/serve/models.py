"""Models of one size that `bench serve` compares, and their memory traffic.

GDN-2 ("G"), the hybrid ("GS") and a softmax transformer ("A") share width,
layers, vocabulary and code; the width of the MLPs is chosen for equal parameter
counts, as in the paper's two 1.3B models.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gdn2_jax.inference.state import State, init_state
from gdn2_jax.model.accounting import abstract_params, count_parameters
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.lm import LM
from gdn2_jax.model.mixers.attention import AttentionConfig
from gdn2_jax.model.mixers.gdn2 import GDN2Cache, GDN2Config
from gdn2_jax.model.mixers.kv_cache import KVCache, RingCache

PATTERNS = {"GDN-2": "G", "hybrid": "GS", "softmax": "A"}
ROOM = 512  # tokens that a round of timing may generate after a length
_TILE = 1 << 20  # random numbers, repeated to fill a cache


class Preset(NamedTuple):
  """Sizes that the three models share."""

  vocab_size: int
  dim: int
  layers: int
  heads: int
  attention_heads: int
  channels: int  # of a head
  window: int  # of the hybrid's attention
  mlp: int  # of GDN-2; the other models' are chosen to match its size
  mlp_step: int  # divides all MLP widths


# In the order of the fields.
PRESETS = {
  "tiny": Preset(64, 32, 2, 2, 2, 16, 32, 48, 4),
  "nano": Preset(512, 128, 4, 2, 2, 64, 1024, 256, 16),
  "small": Preset(4096, 256, 6, 4, 4, 64, 2048, 512, 16),
  "120M": Preset(32000, 768, 12, 6, 6, 128, 2048, 1024, 64),
  "1.3B": Preset(32000, 2304, 18, 16, 18, 128, 2048, 6208, 64),
}


def make_configs(
  preset: Preset, dtype: str, names: tuple[str, ...] = tuple(PATTERNS)
) -> dict[str, ModelConfig]:
  """Configs by name, all with about as many parameters as GDN-2."""
  target = count_parameters(_config(preset, "G", preset.mlp, dtype)).total
  configs = {}
  for name in names:
    pattern, mlp = PATTERNS[name], preset.mlp
    config = _config(preset, pattern, mlp, dtype)
    missing = target - count_parameters(config).total
    # An MLP has three matrices of its width.
    a_step = 3 * preset.dim * preset.layers * preset.mlp_step
    mlp += round(missing / a_step) * preset.mlp_step
    configs[name] = _config(preset, pattern, mlp, dtype)
  return configs


def _config(preset, pattern, mlp, dtype):
  p = preset
  return ModelConfig(
    vocab_size=p.vocab_size,
    model_dim=p.dim,
    num_layers=p.layers,
    pattern=pattern,
    mlp_dim=mlp,
    gdn2=GDN2Config(
      num_heads=p.heads, key_dim=p.channels, value_dim=p.channels
    ),
    attention=AttentionConfig(
      num_heads=p.attention_heads, head_dim=p.channels, window=p.window
    ),
    dtype=dtype,
    param_dtype=dtype,
  )


def random_params(config: ModelConfig, seed: int = 0) -> Any:
  """Initial parameters, unboxed."""
  init = jax.jit(
    LM(config).init, compiler_options={"xla_backend_optimization_level": 0}
  )
  variables = init(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))
  return nn.unbox(variables)["params"]


def read_weight_bytes(config: ModelConfig, batch: int) -> int:
  """Bytes of parameters that a step reads; one embedding row per sequence."""
  params = abstract_params(config)
  table = bytes_of(params["embedding"])
  row = table // config.vocab_size
  return bytes_of(params) - table + batch * row


def moved_state_bytes(state: State, length: int) -> int:
  """Bytes of a state that a step at this position must move.

  A recurrent state and its convolution tails are read and written. Of keys and
  values those that the query may see are read, and one is written.
  """
  return sum(_moved(cache, length) for cache in state.cache)


def _moved(cache, length):
  if isinstance(cache, GDN2Cache):
    return 2 * bytes_of(cache)
  slots = cache.k.shape[3]
  # The query sees its own key, so of a full ring one slot less.
  one = (bytes_of(cache.k) + bytes_of(cache.v)) // slots
  seen = min(length, slots - 1 if isinstance(cache, RingCache) else slots)
  return (seen + 1) * one


def bytes_of(tree: Any) -> int:
  """Bytes of all arrays of a tree, or of their shapes."""
  return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))


def capacity(length: int) -> int:
  """Slots of a softmax cache made for timing at this length."""
  return length + ROOM


def state_at(config: ModelConfig, batch: int, length: int) -> State:
  """State as after `length` tokens: true positions, values of noise."""
  state = init_state(config, batch, capacity(length))
  noise = jax.random.normal(jax.random.key(0), (_TILE,))
  cache = tuple(_filled(part, length, noise) for part in state.cache)
  position = jnp.full_like(state.position, length)
  return state.replace(cache=cache, position=position)


def rewound(state: State, length: int) -> State:
  """State with its softmax caches back at `length` tokens."""

  def back(part):
    if not isinstance(part, KVCache):
      return part
    # The slots after it hold tokens that will be written again.
    return part.replace(next_position=jnp.full_like(part.next_position, length))

  return state.replace(cache=tuple(map(back, state.cache)))


def _filled(cache, length, noise):
  def fill(a):
    return jnp.resize(noise.astype(a.dtype), a.shape)

  if isinstance(cache, GDN2Cache):
    return jax.tree.map(fill, cache)
  slots = cache.k.shape[3]
  # The last positions, as many as there are slots, each in its own.
  last = length - 1 - (length - 1 - np.arange(slots)) % slots
  last = np.where(last >= 0, last, -1).astype(np.int32)
  full = {
    "k": fill(cache.k),
    "v": fill(cache.v),
    "next_position": jnp.full_like(cache.next_position, length),
  }
  if isinstance(cache, RingCache):
    held = np.broadcast_to(last, cache.positions.shape)
    full["positions"] = jnp.asarray(held)
  return cache.replace(**full)
