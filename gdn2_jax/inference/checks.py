"""Checks of input before any computation, and of logits after it.

Shapes and parameters are compared while a program is traced, numbers while
they are on the host, so a decoding step pays for neither. Logits are tested on
the device; the result returns with the tokens.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.lm import LM

MAX_POSITION = 2**31 - 1  # tokens of one sequence, counted in int32


class NonFiniteError(ValueError):
  """Non-finite logits: no token can be chosen from them.

  Args:
    name: argument that has the rows at fault, for the message.
    failures: message by row; at least one.
    tokens: as the attribute.

  Attributes:
    rows: rows at fault, in ascending order.
    tokens: B lists of chosen ids if `generate` raised this, complete in all
      rows but those at fault; else None.
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
  """Tests that `value` is not a tracer, so that its numbers can be read."""
  return not isinstance(value, jax.core.Tracer)


def require_count(name: str, value: Any, least: int = 1) -> None:
  """Raises ValueError unless `value` is an integer >= least."""
  if isinstance(value, bool) or not isinstance(value, int | np.integer):
    raise ValueError(f"{name}: expected an integer, got {value!r}")
  if value < least:
    raise ValueError(f"{name}: expected >= {least}, got {value}")


def require_key(name: str, key: Any) -> None:
  """Raises ValueError unless `key` is one typed PRNG key."""
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
  name: str, ids: Any, vocab_size: int, least: int = 1
) -> np.ndarray:
  """Returns at least `least` valid token ids as int32 [n], or raises."""
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
    raise ValueError(f"{name}: expected at least one token id, got none")
  if array.size:
    _require_integers(name, array)
    _require_range(name, array, vocab_size)
  return array.astype(np.int32)


def require_alive(state: Any) -> None:
  """Raises ValueError if the state was donated to an earlier call."""
  for leaf in jax.tree.leaves(state):
    if is_concrete(leaf) and isinstance(leaf, jax.Array) and leaf.is_deleted():
      raise ValueError(
        "state: was donated to an earlier call, which reused its buffers; use "
        "the state that call returned, or keep a copy from fork(state, 1)"
      )


def require_state(state: Any, config: ModelConfig, batch_size: int) -> None:
  """Raises ValueError unless `state` has this config and batch size."""
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
  """Raises ValueError unless `count` tokens more than `position` fit."""
  limit = MAX_POSITION if max_length is None else max_length
  total = np.asarray(jax.device_get(position), np.int64) + count
  if (total > limit).any():
    raise ValueError(
      f"state: has room for max_length={limit} tokens per sequence, got "
      f"{int(total.max())} including the new ones"
    )


def require_block(tokens: Any, lengths: Any, state: Any) -> None:
  """Raises ValueError unless `state` can read `tokens` [B, T]."""
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
  """Raises ValueError unless `state` can read `token` [B]."""
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
      found, expected = (
        f"has shape {shapes[name]}" if name in shapes else "is missing"
        for shapes in (got, want)
      )
      raise ValueError(
        f"params: {name} {found}, but in the model of the state it {expected}; "
        f"that model is {config}"
      )


@functools.lru_cache(maxsize=64)
def _param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  def init():
    return LM(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))

  return _shapes(jax.eval_shape(init)["params"])


def _shapes(params) -> dict[str, tuple[int, ...]]:
  """Shapes by path of dictionary keys: boxes of sharding names add no key."""
  keyed = jax.tree_util.DictKey
  return {
    "/".join(str(key.key) for key in path if isinstance(key, keyed)): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }


def is_usable(logits: Float[Array, "*b VOCAB"]) -> Bool[Array, "*b"]:
  """Tests that a token can be chosen: no NaN, no +inf, not all -inf."""
  return jnp.isfinite(jnp.max(logits, axis=-1))


def find_causes(params: Any, state: Any, rows: Sequence[int]) -> dict[int, str]:
  """Cause of non-finite logits by row: parameters, state or overflow."""
  # Reads all parameters and all of the state: only after a failure.
  params_ok, rows_ok = jax.device_get(_finite_parts(params, state.cache))
  leaves = jax.tree_util.tree_leaves_with_path(params_ok)
  bad = [path for path, ok in leaves if not ok]
  if bad:
    name = jax.tree_util.keystr(bad[0], simple=True, separator="/")
    more = f" and {len(bad) - 1} more" if bad[1:] else ""
    cause = f"params: NaN or infinity in {name}{more}; load undamaged weights"
    return dict.fromkeys(rows, cause)
  damaged = "state: NaN or infinity in this row, none in params; start it anew"
  overflow = f"params, state: all finite; dtype={state.config.dtype} overflows"
  return {row: overflow if rows_ok[row] else damaged for row in rows}


@jax.jit
def _finite_parts(params, cache):
  """Finite or not: each parameter, and each row of the cache [B]."""

  def rows(leaf):
    return jnp.isfinite(leaf).all(axis=(0, *range(2, leaf.ndim)))

  parts = [rows(leaf) for leaf in jax.tree.leaves(cache)]
  params = jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), params)
  return params, jnp.stack(parts).all(axis=0)
