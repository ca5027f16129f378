"""Refusals of bad input, each before any computation.

Values are looked at where that costs nothing: shapes while a program is
traced, numbers while they are still on the host.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.lm import LM


def require_alive(state: Any) -> None:
  """Raises ValueError if a buffer of the state was given away."""
  for leaf in jax.tree.leaves(state):
    if is_concrete(leaf) and isinstance(leaf, jax.Array) and leaf.is_deleted():
      raise ValueError(
        "state: was donated to an earlier call, which reused its buffers; go "
        "on with the state which that call returned, or copy it before"
      )


def require_batch(name: str, array: Any, state: Any) -> None:
  """Raises ValueError unless `array` has one row per sequence of `state`."""
  rows, batch_size = array.shape[0], state.position.shape[0]
  if rows != batch_size:
    raise ValueError(
      f"{name}: expected B={batch_size} rows, the batch size of the state, "
      f"got {rows}"
    )


def require_params(params: Any, config: ModelConfig) -> None:
  """Raises ValueError unless `params` are unboxed parameters of LM(config).

  Compares names and shapes alone; called where a program is traced, so that
  it costs nothing per call.
  """
  want = _param_shapes(config)
  got = _shapes(params)
  for name in sorted(want.keys() | got.keys()):
    if want.get(name) != got.get(name):
      raise ValueError(
        f"params: {name} {_tell(got.get(name))}, but in the model of the state "
        f"it {_tell(want.get(name))}; that model is {config}"
      )


@functools.lru_cache(maxsize=64)
def _param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  def init():
    return LM(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))

  return _shapes(jax.eval_shape(init)["params"])


def _shapes(params) -> dict[str, tuple[int, ...]]:
  def is_box(leaf):
    return isinstance(leaf, nn.meta.AxisMetadata)

  def name(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")

  leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_box)
  return {
    name(path): tuple(
      (leaf.unbox(apply_constraint=False) if is_box(leaf) else leaf).shape
    )
    for path, leaf in leaves
  }


def _tell(shape) -> str:
  return "is missing" if shape is None else f"has shape {shape}"


def require_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
  """Raises ValueError unless all ids are in [0, vocab_size)."""
  outside = [i for i in ids if not 0 <= i < vocab_size]
  if outside:
    raise ValueError(
      f"{name}: expected ids in [0, {vocab_size}), got {outside[0]}"
    )


def require_prefill(tokens, lengths, state, chunk_size) -> None:
  """Raises ValueError for anything that `prefill` cannot read."""
  require_alive(state)
  batch_size = state.position.shape[0]
  vocab_size = state.config.vocab_size
  if tokens.shape[0] != batch_size or tokens.shape[1] < 1:
    raise ValueError(
      f"tokens: expected shape [B={batch_size}, T >= 1] for this state, got "
      f"{tokens.shape}"
    )
  if lengths.shape != (batch_size,):
    raise ValueError(
      f"lengths: expected shape ({batch_size},), got {lengths.shape}"
    )
  if chunk_size < 1:
    raise ValueError(f"chunk_size: expected >= 1, got {chunk_size}")
  if not is_concrete(tokens) or not is_concrete(lengths):
    return
  tokens, lengths = jax.device_get((tokens, lengths))
  if lengths.min() < 1 or lengths.max() > tokens.shape[1]:
    raise ValueError(
      f"lengths: expected 1 to T={tokens.shape[1]}, got {lengths.tolist()}"
    )
  real = np.arange(tokens.shape[1])[None] < lengths[:, None]
  outside = real & ((tokens < 0) | (tokens >= vocab_size))
  if outside.any():
    raise ValueError(
      f"tokens: expected ids in [0, {vocab_size}), got "
      f"{int(tokens[outside][0])}"
    )


def is_concrete(value: Any) -> bool:
  """Whether `value` has numbers, as it has not while jit traces."""
  return not isinstance(value, jax.core.Tracer)
