"""Start states of the shards of a sequence that is split over devices.

Eq. 10 is affine in the state, so the tokens of shard r map it as

  S -> M_r S + U_r,      M_r [K, K],  U_r [K, V]

and the shard starts from S_r, with S_0 given and S_{r+1} = M_r S_r + U_r. This
module computes S_r from all (M_r, U_r). The size of its messages does not
depend on the length of the sequence. With P devices, a device receives, in
units of one state (the size of U, and of M if V = K):

  ring         1, but after P - 1 messages that wait for each other
  all_to_all   3 (P-1)/P in two messages: a device gets the maps of all shards
               for its part of the rows, chains them, and sends the states back
  doubling     2 log2(P) in log2(P) + 1 messages (Hillis and Steele)

Legend: P devices, B batch, H key heads, K key channels, V value channels of all
the value heads of a key head, R rows (B * H).
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Scheme = Literal["ring", "all_to_all", "doubling"]

SCHEMES = ("ring", "all_to_all", "doubling")


def choose_scheme(scheme: str | None, devices: int, rows: int) -> Scheme:
  """Checks a named scheme, or chooses the cheapest one for None.

  With two devices "ring" sends one state in one message. With more,
  "all_to_all" sends the least, but needs a number of rows (batch rows times key
  heads) that is a multiple of the devices. "doubling" has no such condition.
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
  reverse: bool = False,
) -> Float[Array, "B H K V"]:
  """Start state S_r of this device's shard, under shard_map.

  `state` is S_0, and only the first device's is used. With `reverse` the chain
  runs from the last shard to the first, S_{r-1} = M_r S_r + U_r, starting with
  the last device's `state`.
  """
  run = {"ring": _ring, "all_to_all": _all_to_all, "doubling": _doubling}
  return run[scheme](M, U, state, _Chain(axis_name, reverse))


class _Chain(NamedTuple):
  """Order of the devices along the chain; place 0 has the first map."""

  axis: str
  reverse: bool

  @property
  def devices(self):
    return lax.axis_size(self.axis)

  @property
  def place(self):
    """Place of this device."""
    rank = lax.axis_index(self.axis)
    return self.devices - 1 - rank if self.reverse else rank

  def by_device(self, x):
    """Reorders a list from places to devices, or back."""
    return x[::-1] if self.reverse else x

  def send(self, x, distance, places=None):
    """Sends x from `places` (None: all) `distance` ahead; zeros elsewhere."""
    device = self.by_device(list(range(self.devices)))
    places = range(self.devices - distance) if places is None else places
    pairs = [(device[p], device[p + distance]) for p in places]
    return lax.ppermute(x, self.axis, pairs)


def _compose(M, X):
  return jnp.matmul(M, X, precision=lax.Precision.HIGHEST)


def _ring(M, U, state, chain):
  """Place p sends S_{p+1} to the next one as soon as it has S_p."""
  start = state
  for sender in range(chain.devices - 1):
    received = chain.send(_compose(M, start) + U, 1, [sender])
    start = jnp.where(chain.place == sender + 1, received, start)
  return start


def _first_as_state(M, U, state, chain):
  """U, with place 0's replaced by the state after its shard, S_1."""
  return jnp.where(chain.place == 0, _compose(M, state) + U, U)


def _all_to_all(M, U, state, chain):
  """Every device chains the maps of all shards for its part of the rows."""
  devices, (K, V) = chain.devices, U.shape[-2:]
  rows = M.shape[0] * M.shape[1]

  def exchange(x_RK_):
    return lax.all_to_all(x_RK_, chain.axis, 0, 0, tiled=True)

  U = _first_as_state(M, U, state, chain)
  maps = jnp.concatenate([M, U], axis=-1).reshape(rows, K, K + V)
  maps = exchange(maps).reshape(devices, rows // devices, K, K + V)
  maps = chain.by_device(maps)  # now by place
  starts = [jnp.zeros_like(maps[0, ..., K:]), maps[0, ..., K:]]
  for M_p, U_p in zip(maps[1:-1, ..., :K], maps[1:-1, ..., K:], strict=True):
    starts.append(_compose(M_p, starts[-1]) + U_p)
  starts = exchange(jnp.concatenate(chain.by_device(starts)))
  return jnp.where(chain.place == 0, state, starts.reshape(U.shape))


def _doubling(M, U, state, chain):
  """Composes the maps of 1, 2, 4, ... shards up to this one."""
  # The first map must give S_1 for any state, so its M is zero.
  U = _first_as_state(M, U, state, chain)
  M = jnp.where(chain.place == 0, jnp.zeros_like(M), M)
  distance = 1
  while distance < chain.devices:
    U = _compose(M, chain.send(U, distance)) + U
    if 2 * distance < chain.devices:
      earlier = _compose(M, chain.send(M, distance))
      M = jnp.where(chain.place >= distance, earlier, M)
    distance *= 2
  return jnp.where(chain.place == 0, state, chain.send(U, 1))
