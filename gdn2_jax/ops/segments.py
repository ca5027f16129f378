"""Segments of packed rows: restarts of the state and positions of tokens.

A row of segment_ids has one id per token. 0 is padding, which the recurrence
skips. A token starts from a zero state if its id differs from that of the last
token before it that is not padding, even if an earlier segment had the same id.
The first segment of a row continues the initial state.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


def previous_tokens(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
  """Index of the last token before each that is not padding, or -1."""
  T = segment_ids.shape[1]
  index_BT = jnp.where(segment_ids != 0, jnp.arange(T)[None], -1)
  last_BT = lax.cummax(index_BT, axis=1)
  return jnp.pad(last_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)


def segment_starts(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
  """True at tokens before which the state restarts from zero."""
  valid_BT = segment_ids != 0
  last_BT = previous_tokens(segment_ids)
  before_BT = jnp.take_along_axis(segment_ids, jnp.maximum(last_BT, 0), axis=1)
  return valid_BT & (last_BT >= 0) & (before_BT != segment_ids)


def reset_counts(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
  """Number of restarts up to and including each token.

  Two tokens share a state exactly where their counts are equal.
  """
  return jnp.cumsum(segment_starts(segment_ids), axis=1, dtype=jnp.int32)


def segment_positions(
  segment_ids: Int[Array, "B T"], first: Int[Array, "B"]
) -> Int[Array, "B T"]:
  """Position of each token in its segment, padding not counted.

  Positions start from 0, and from `first` in the first segment: the number of
  tokens that the initial state has read. Padding repeats the position before.
  """
  starts_BT = segment_starts(segment_ids)
  count_BT = jnp.cumsum(segment_ids != 0, axis=1, dtype=jnp.int32)
  before_BT = lax.cummax(jnp.where(starts_BT, count_BT - 1, 0), axis=1)
  is_first_BT = jnp.cumsum(starts_BT, axis=1) == 0
  offset_BT = jnp.where(is_first_BT, first[:, None], 0)
  return jnp.maximum(count_BT - 1 - before_BT, 0) + offset_BT


def drop_padding(
  segment_ids: Int[Array, "B T"], *arrays: Float[Array, "B T _ _"]
) -> tuple[Float[Array, "B T _ _"], ...]:
  """Sets every array to zero at padding tokens, which may hold NaN."""
  valid = (segment_ids != 0)[:, :, None, None]
  return tuple(jnp.where(valid, x, jnp.zeros((), x.dtype)) for x in arrays)


def before_each(
  x: Float[Array, "B T *axes"],
  first: Float[Array, "B *axes"],
  segment_ids: Int[Array, "B T"] | None,
) -> Float[Array, "B T *axes"]:
  """The token before each one, padding skipped; `first` if there is none."""
  x = jnp.concatenate([first[:, None].astype(x.dtype), x], axis=1)
  if segment_ids is None:
    return x[:, :-1]
  return _take(x, previous_tokens(segment_ids) + 1)


def last_token(
  x: Float[Array, "B T *axes"],
  first: Float[Array, "B *axes"],
  segment_ids: Int[Array, "B T"] | None,
) -> Float[Array, "B *axes"]:
  """Last token of a row that is not padding; `first` if there is none."""
  if segment_ids is None:
    return x[:, -1]
  index_BT = jnp.where(segment_ids != 0, jnp.arange(x.shape[1])[None], -1)
  last_B1 = index_BT.max(axis=1, keepdims=True)
  x = jnp.concatenate([first[:, None].astype(x.dtype), x], axis=1)
  return _take(x, last_B1 + 1)[:, 0]


def _take(x, index_BT):
  """Tokens of x [B, T, ...] by their index."""
  index = index_BT.reshape(*index_BT.shape, *(1,) * (x.ndim - 2))
  return jnp.take_along_axis(x, index, axis=1)
