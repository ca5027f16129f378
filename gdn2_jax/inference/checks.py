"""Refusals of bad input before any computation, and of non-finite logits after.

Shapes and parameters are compared while a program is traced, numbers while
they are on the host: neither costs a decoding step anything. Logits are tested
on the device, and a flag travels with the tokens.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from gdn2_jax.interop.tree import param_leaves
from gdn2_jax.model.accounting import abstract_params
from gdn2_jax.model.config import ModelConfig

MAX_POSITION = 2**31 - 1  # tokens of one sequence, counted in int32


class NonFiniteError(ValueError):
  """Logits of the model that no token can be chosen from.

  Args:
    name: argument whose rows these are.
    failures: description of each failure, by row; at least one.
    tokens: see below.

  Attributes:
    rows: the rows at fault, in ascending order.
    tokens: from `generate`, B lists of the ids chosen, complete in all rows but
      those at fault; else None.
  """

  def __init__(
    self,
    name: str,
    failures: Mapping[int, str],
    tokens: list[list[int]] | None = None,
  ):
    self.rows = sorted(failures)
    self.tokens = tokens
    first, *others = self.rows
    more = f" (rows at fault: {len(self.rows)})" if others else ""
    super().__init__(f"{name}[{first}]: {failures[first]}{more}")


def is_concrete(value: Any) -> bool:
  """True for a value with numbers, False for one that jit traces."""
  return not isinstance(value, jax.core.Tracer)


def require_count(name: str, value: Any, least: int = 1) -> None:
  """Raises ValueError unless `value` is an integer >= least."""
  if isinstance(value, bool) or not isinstance(value, int | np.integer):
    raise ValueError(f"{name}: expected an integer, got {value!r}")
  if value < least:
    raise ValueError(f"{name}: expected >= {least}, got {value}")


def require_key(name: str, key: Any) -> None:
  """Raises ValueError unless `key` is one typed key."""
  dtype = getattr(key, "dtype", type(key).__name__)
  typed = isinstance(key, jax.Array) and jnp.issubdtype(
    dtype, jax.dtypes.prng_key
  )
  if not typed or key.shape:
    raise ValueError(
      f"{name}: expected one typed key, as from jax.random.key(seed), got "
      f"{dtype}{list(getattr(key, 'shape', []))}"
    )


def require_ids(
  name: str, ids: Any, vocab_size: int, least: int = 0
) -> np.ndarray:
  """Checks a list or array of ids in [0, vocab_size); returns int32 [n]."""
  try:
    array = np.asarray(ids)
  except ValueError as e:
    raise ValueError(f"{name}: expected a list of token ids: {e}") from None
  if array.ndim != 1:
    raise ValueError(
      f"{name}: expected a list of token ids, got {type(ids).__name__} of "
      f"shape {array.shape}"
    )
  if array.size < least:
    raise ValueError(f"{name}: expected at least one token, got none")
  if array.size:
    _require_integers(name, array)
    _require_range(name, array, vocab_size)
  return array.astype(np.int32)


def require_alive(state: Any) -> None:
  """Raises ValueError if a buffer of the state was donated."""
  for leaf in jax.tree.leaves(state):
    if is_concrete(leaf) and isinstance(leaf, jax.Array) and leaf.is_deleted():
      raise ValueError(
        "state: was donated to an earlier call, which reused its buffers; "
        "continue with the state which that call returned, or fork(state, 1) "
        "before"
      )


def require_state(state: Any, config: ModelConfig, batch_size: int) -> None:
  """Raises ValueError unless `state` is one of this model and batch size."""
  require_alive(state)
  if state.config != config:
    raise ValueError(
      f"state: a state of another model: {state.config}, expected {config}"
    )
  if state.batch_size != batch_size:
    raise ValueError(
      f"state: expected one of batch size {batch_size}, got {state.batch_size}"
    )


def require_room(position: Any, count: Any, max_length: int | None) -> None:
  """Raises ValueError if `count` tokens from `position` exceed max_length."""
  limit = MAX_POSITION if max_length is None else max_length
  total = np.asarray(jax.device_get(position), np.int64) + count
  if (total > limit).any():
    raise ValueError(
      f"state: has room for max_length={limit} tokens of a sequence, got "
      f"{int(total.max())} with the new ones"
    )


def require_block(tokens: Any, lengths: Any, state: Any) -> None:
  """Raises ValueError unless `tokens` [B, T] can be read by `state`."""
  require_alive(state)
  batch_size = state.batch_size
  shape = tuple(tokens.shape)
  if len(shape) != 2 or shape[0] != batch_size or shape[1] < 1:
    raise ValueError(
      f"tokens: expected shape [B={batch_size}, T >= 1] for a state of "
      f"batch size {batch_size}, got {shape}"
    )
  if tuple(lengths.shape) != (batch_size,):
    raise ValueError(
      f"lengths: expected shape ({batch_size},) for a state of batch size "
      f"{batch_size}, got {tuple(lengths.shape)}"
    )
  _require_integers("tokens", tokens)
  _require_integers("lengths", lengths)
  if not is_concrete(tokens) or not is_concrete(lengths):
    return
  tokens, lengths = jax.device_get((tokens, lengths))
  if lengths.min() < 1 or lengths.max() > shape[1]:
    raise ValueError(
      f"lengths: expected 1 to T={shape[1]}, got {lengths.tolist()}"
    )
  real = np.arange(shape[1])[None] < lengths[:, None]
  _require_range("tokens", tokens[real], state.config.vocab_size)
  if is_concrete(state.position):
    require_room(state.position, lengths.astype(np.int64), state.max_length)


def require_step(token: Any, state: Any) -> None:
  """Raises ValueError unless `token` [B] can be read by `state`."""
  require_alive(state)
  if tuple(token.shape) != (state.batch_size,):
    raise ValueError(
      f"token: expected shape ({state.batch_size},) for a state of batch size "
      f"{state.batch_size}, got {tuple(token.shape)}"
    )
  _require_integers("token", token)
  if isinstance(token, np.ndarray):
    _require_range("token", token, state.config.vocab_size)


def _require_integers(name, array) -> None:
  if not jnp.issubdtype(array.dtype, jnp.integer):
    raise ValueError(f"{name}: expected integers, got {array.dtype}")


def _require_range(name, ids, vocab_size) -> None:
  outside = ids[(ids < 0) | (ids >= vocab_size)]
  if outside.size:
    raise ValueError(
      f"{name}: expected ids in [0, {vocab_size}), got {int(outside[0])}"
    )


def require_params(params: Any, config: ModelConfig) -> None:
  """Raises ValueError unless names and shapes are those of LM(config)."""
  want, got = _param_shapes(config), _shapes(params)
  for name in sorted(want.keys() | got.keys()):
    if want.get(name) != got.get(name):
      raise ValueError(
        f"params: {name} {_tell(got.get(name))}, but in the model of the state "
        f"it {_tell(want.get(name))}; that model is {config}"
      )


@functools.lru_cache(maxsize=64)
def _param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  return _shapes(abstract_params(config))


def _shapes(params) -> dict[str, tuple[int, ...]]:
  return {"/".join(path): leaf.shape for path, leaf in param_leaves(params)}


def _tell(shape) -> str:
  return "is missing" if shape is None else f"has shape {shape}"


def is_usable(logits: Float[Array, "*b VOCAB"]) -> Bool[Array, "*b"]:
  """True where a token can be chosen: no NaN, no +inf, not -inf alone."""
  return jnp.isfinite(jnp.max(logits, axis=-1))


def find_causes(params: Any, state: Any, rows: Sequence[int]) -> dict[int, str]:
  """Cause of non-finite logits, by row; reads all weights and states."""
  params_ok, rows_ok = jax.device_get(_finite_parts(params, state.cache))
  leaves = jax.tree_util.tree_leaves_with_path(params_ok)
  bad = [path for path, ok in leaves if not ok]
  if bad:
    name = jax.tree_util.keystr(bad[0], simple=True, separator="/")
    more = f" and {len(bad) - 1} more" if bad[1:] else ""
    cause = f"params: NaN or infinity in {name}{more}; load sound weights"
    return dict.fromkeys(rows, cause)
  damaged = "state: NaN or infinity in this row, none in params; begin it anew"
  overflow = f"params, state: all finite; dtype={state.config.dtype} overflows"
  return {row: overflow if rows_ok[row] else damaged for row in rows}


@jax.jit
def _finite_parts(params, cache):
  """True where all is finite: per parameter, and per row of a cache [B]."""

  def rows(leaf):
    return jnp.isfinite(leaf).all(axis=(0, *range(2, leaf.ndim)))

  parts = [rows(leaf) for leaf in jax.tree.leaves(cache)]
  params = jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), params)
  return params, jnp.stack(parts).all(axis=0)
