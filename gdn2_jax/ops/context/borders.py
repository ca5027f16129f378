"""Exchanges across the borders of rows that are split over devices.

Segment rules are those of segments.py, applied to the whole row: a document
continues across a border if the nearest ids on its two sides that are not
padding are equal.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from gdn2_jax.ops.segments import segment_starts


def check_axis(axis_name: str) -> int:
  """Number of devices along a mesh axis; ValueError outside shard_map."""
  try:
    return lax.axis_size(axis_name)
  except NameError:
    raise ValueError(
      f"axis_name: got {axis_name!r}, expected a mesh axis of the shard_map"
      " that this is called under"
    ) from None


def left_halo(x: Array, length: int, *, axis_name: str) -> Array:
  """The `length` tokens before this shard; zeros before the first shard.

  More tokens than a shard holds need one message per shard.
  """
  T, devices = x.shape[1], lax.axis_size(axis_name)
  parts, missing = [], length
  for distance in range(1, devices):
    if missing == 0:
      break
    size = min(missing, T)
    missing -= size
    pairs = [(r, r + distance) for r in range(devices - distance)]
    # A device that is no target of ppermute receives zeros.
    part = lax.ppermute(x[:, T - size :], axis_name, pairs)
    parts.insert(0, part)
  if missing:
    parts.insert(
      0, jnp.zeros_like(x, shape=(x.shape[0], missing, *x.shape[2:]))
    )
  return jnp.concatenate(parts, axis=1)


class _Shards(NamedTuple):
  """Summary [B, P] of all P shards, the same on every device."""

  restarts: Bool[Array, "B P"]
  tokens: Int[Array, "B P"]
  starts: Int[Array, "B P"]
  last_start: Int[Array, "B P"]


def _gather_shards(segment_ids, starts, axis):
  """Gathers five integers per row and shard, for rows of any length."""
  T = segment_ids.shape[1]
  valid = segment_ids != 0
  index = jnp.arange(T, dtype=jnp.int32)[None]
  first = jnp.where(valid, index, T - 1).min(axis=1, keepdims=True)
  last = jnp.where(valid, index, 0).max(axis=1, keepdims=True)
  count = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
  # Both ends of a shard with nothing but padding are 0, which is no border.
  ends = [jnp.take_along_axis(segment_ids, at, axis=1) for at in (first, last)]
  numbers = [
    *(jnp.where(valid.any(axis=1, keepdims=True), x, 0) for x in ends),
    count[:, -1:],
    starts.sum(axis=1, keepdims=True),
    jnp.where(starts, count - 1, -1).max(axis=1, keepdims=True),
  ]
  numbers = [x.astype(jnp.int32) for x in numbers]
  gathered = lax.all_gather(jnp.concatenate(numbers, axis=1), axis, axis=1)
  ends = gathered[:, :, :2].reshape(gathered.shape[0], -1)
  restarts = segment_starts(ends)[:, ::2]
  tokens, starts, last_start = (gathered[:, :, i] for i in (2, 3, 4))
  return _Shards(
    restarts,
    tokens,
    starts + restarts,
    # A restart at the border is at token 0 of the shard, unless one follows.
    jnp.where(restarts & (last_start < 0), 0, last_start),
  )


def continues(
  segment_ids: Int[Array, "B T"], *, axis_name: str
) -> Bool[Array, "B"]:
  """True where this shard's first token continues an earlier document.

  False where the state restarts at the shard's first token; True in rows
  without an earlier token or without a token here. Padding is skipped.
  """
  starts = jnp.zeros_like(segment_ids, bool)
  shards = _gather_shards(segment_ids, starts, axis_name)
  return ~_own(shards.restarts, axis_name)


def _own(x_BP, axis):
  rank = lax.axis_index(axis)
  return lax.dynamic_index_in_dim(x_BP, rank, axis=1, keepdims=False)


def runs_and_positions(
  segment_ids: Int[Array, "B T"], *, axis_name: str
) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
  """Segment numbers along the whole row, from 1 (padding 0), and positions.

  Positions are those of segments.segment_positions with first = 0.
  """
  valid = segment_ids != 0
  local = segment_starts(segment_ids)
  shards = _gather_shards(segment_ids, local, axis_name)
  count = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
  restarts = _own(shards.restarts, axis_name)[:, None]
  starts = local | (valid & (count == 1) & restarts)

  rank = lax.axis_index(axis_name)
  earlier = jnp.arange(shards.tokens.shape[1])[None] < rank
  seen = jnp.cumsum(shards.tokens, axis=1) - shards.tokens  # before each shard
  last_start = jnp.where(
    earlier & (shards.last_start >= 0), shards.last_start + seen, 0
  )
  count = count + _own(seen, axis_name)[:, None]
  before = lax.cummax(jnp.where(starts, count - 1, 0), axis=1)
  before = jnp.maximum(before, last_start.max(axis=1, keepdims=True))
  runs = jnp.cumsum(starts, axis=1, dtype=jnp.int32) + 1
  runs = runs + jnp.where(earlier, shards.starts, 0).sum(axis=1, keepdims=True)
  return jnp.where(valid, runs, 0), jnp.maximum(count - 1 - before, 0)


def from_rank(x: Array, rank: int | Array, *, axis_name: str) -> Array:
  """Broadcasts the value of device `rank` (one, or [B]) to all devices."""
  is_it = jnp.asarray(lax.axis_index(axis_name) == rank)
  is_it = is_it.reshape(is_it.shape + (1,) * (x.ndim - is_it.ndim))
  return lax.psum(jnp.where(is_it, x, jnp.zeros_like(x)), axis_name)


def vary(x: jax.Array | None, axis_name: str) -> jax.Array | None:
  """Marks a replicated array as varying over a mesh axis."""
  if x is None or axis_name in jax.typeof(x).manual_axis_type.varying:
    return x
  return lax.pcast(x, axis_name, to="varying")


def vary_together(arrays):
  """Marks all arrays as varying over the union of their mesh axes.

  Under shard_map, loop carries and cotangents vary over the axes of all inputs
  together. Replicated inputs, and zeros made here, vary over fewer.
  """

  def varying(x):
    return jax.typeof(x).manual_axis_type.varying

  axes = frozenset().union(*(varying(x) for x in arrays if x is not None))
  return [
    x
    if x is None
    else lax.pcast(x, tuple(sorted(axes - varying(x), key=str)), to="varying")
    for x in arrays
  ]
