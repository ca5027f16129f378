"""Start states of the shards of a sequence that is split over devices.

Eq. 10 is affine in the state, so the tokens of shard r take it through

  S -> M_r S + U_r,      M_r [K, K],  U_r [K, V]

and the shard starts from S_r, with S_0 given and S_{r+1} = M_r S_r + U_r. This
file finds the S_r from the (M_r, U_r). What is sent does not depend on the
length of the sequence. With P devices a device receives, in units of one state
(U, and M where V = K):

  ring         1, but after P - 1 messages that wait for each other
  all_to_all   3 (P-1)/P in two messages: a device gets the maps of all shards
               for its part of the rows, chains them, and sends the states back
  doubling     2 log2(P) in log2(P) + 1 messages (Hillis and Steele)

Legend: P devices, B batch, H key heads, K key channels, V value channels of all
the value heads of a key head, R rows (B * H).
"""

from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Scheme = Literal["ring", "all_to_all", "doubling"]

SCHEMES = ("ring", "all_to_all", "doubling")


def choose_scheme(scheme: str | None, devices: int, rows: int) -> Scheme:
  """The scheme that waits least for messages, or the one that is named.

  For two devices a ring is one message of one state. Beyond that all_to_all
  receives the least, whatever the number of devices, but every device needs
  rows to chain: it must divide them. doubling needs no rows.

  Args:
    scheme: One of SCHEMES, or None to choose.
    devices: Over which the sequence is split.
    rows: Batch rows times key heads, of one device.

  Returns:
    The name.

  Raises:
    ValueError: there is no such scheme, or it cannot split the rows.
  """
  if scheme is None:
    if devices <= 2:
      return "ring"
    return "doubling" if rows % devices else "all_to_all"
  if scheme not in SCHEMES:
    raise ValueError(
      f"scheme: got {scheme!r}, expected None or one of {', '.join(SCHEMES)}"
    )
  if scheme == "all_to_all" and rows % devices:
    raise ValueError(
      f"scheme: got 'all_to_all' for {rows} rows (B * H) on {devices} devices,"
      " expected a multiple"
    )
  return scheme


def start_states(
  M: Float[Array, "B H K K"],
  U: Float[Array, "B H K V"],
  state: Float[Array, "B H K V"],
  *,
  axis_name: str,
  scheme: Scheme,
) -> Float[Array, "B H K V"]:
  """The state from which this device's shard starts.

  Call it under shard_map. Differentiable in M, U and state.

  Args:
    M: The linear part of this shard's map, in the dtype of the state.
    U: What the shard makes of a state of zeros.
    state: S_0, the same on all devices but marked as varying over axis_name.
    axis_name: The mesh axis, shards in its order.
    scheme: From choose_scheme.

  Returns:
    S_r.
  """
  run = {"ring": _ring, "all_to_all": _all_to_all, "doubling": _doubling}
  return run[scheme](M, U, state, axis_name)


def _compose(M, X):
  return jnp.matmul(M, X, precision=lax.Precision.HIGHEST)


def _ring(M, U, state, axis):
  """Device r sends S_{r+1} on as soon as it has S_r."""
  rank = lax.axis_index(axis)
  start = state
  for sender in range(lax.axis_size(axis) - 1):
    end = _compose(M, start) + U
    received = lax.ppermute(end, axis, [(sender, sender + 1)])
    start = jnp.where(rank == sender + 1, received, start)
  return start


def _all_to_all(M, U, state, axis):
  """Device i chains the maps of all shards for the i-th part of the rows."""
  devices, (K, V) = lax.axis_size(axis), U.shape[-2:]
  rows = M.shape[0] * M.shape[1]
  part = rows // devices

  def exchange(x_RK_):
    return lax.all_to_all(x_RK_, axis, 0, 0, tiled=True)

  maps = jnp.concatenate([M, U], axis=-1).reshape(rows, K, K + V)
  maps = exchange(maps).reshape(devices, part, K, K + V)
  first = lax.axis_index(axis) * part
  start = lax.dynamic_slice_in_dim(state.reshape(rows, K, V), first, part)
  starts = [start]
  for shard in range(devices - 1):
    M_s, U_s = maps[shard, ..., :K], maps[shard, ..., K:]
    starts.append(_compose(M_s, starts[-1]) + U_s)
  return exchange(jnp.concatenate(starts)).reshape(U.shape)


def _doubling(M, U, state, axis):
  """Composes the maps of 1, 2, 4, ... shards up to this one."""
  devices, rank = lax.axis_size(axis), lax.axis_index(axis)

  def from_left(x, distance):
    # Devices that nobody sends to receive zeros.
    pairs = [(r, r + distance) for r in range(devices - distance)]
    return lax.ppermute(x, axis, pairs)

  # The first map takes any state to S_1, so that U becomes a state.
  U = jnp.where(rank == 0, _compose(M, state) + U, U)
  M = jnp.where(rank == 0, jnp.zeros_like(M), M)
  distance = 1
  while distance < devices:
    U = _compose(M, from_left(U, distance)) + U
    if 2 * distance < devices:
      earlier = from_left(M, distance)
      M = jnp.where(rank >= distance, _compose(M, earlier), M)
    distance *= 2
  return jnp.where(rank == 0, state, from_left(U, 1))
