"""Reading and editing single associations of a recurrent state.

Legend (one head): n associations, K key channels, V value channels; keys
[n, K], values [n, V], state S [K, V], a reading S^T k [V].
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gdn2_jax.analysis.capacity.measure import random_codes
from gdn2_jax.ops.gdn2.api import gdn2, gdn2_step

Rows = Float[Array | np.ndarray, "n _"]


def unit_rows(seed: int, count: int, dim: int) -> Float[np.ndarray, "n D"]:
  """Draws random directions: `count` rows of norm 1, float32."""
  return random_codes(np.random.default_rng(seed), count, dim)


def store(
  keys: Rows, values: Rows, *, erase: float = 1.0
) -> Float[np.ndarray, "K V"]:
  """State after the associations were written in order, from zeros.

  Args:
    keys: [n, K], K at least 16.
    values: [n, V], V at least 16.
    erase: b on all channels; nothing decays, and w = 1.
  """
  keys, values = jnp.asarray(keys), jnp.asarray(values)
  k, v = keys[None, :, None], values[None, :, None]
  zero = jnp.zeros_like(k)
  b, w = jnp.full_like(k, erase), jnp.ones_like(v)
  _, state = gdn2(zero, k, v, zero, b, w, implementation="reference")
  return np.asarray(state[0, 0])


def read(
  state: Float[Array | np.ndarray, "K V"],
  keys: Float[Array | np.ndarray, "*n K"],
) -> Float[np.ndarray, "*n V"]:
  """Readings S^T k of one key or of several, without the factor `scale`."""
  return np.asarray(keys, np.float64) @ np.asarray(state, np.float64)


def edit(
  state: Float[Array | np.ndarray, "K V"],
  key: Float[Array | np.ndarray, "K"],
  value: Float[Array | np.ndarray, "V"],
  *,
  erase: float | Float[np.ndarray, "K"] = 1.0,
  write: float | Float[np.ndarray, "V"] = 1.0,
) -> Float[np.ndarray, "K V"]:
  """State after one token of Eq. 10 without decay.

  With a unit key and erase = write = 1, S^T key is then exactly `value`, and no
  smaller change of S in the Frobenius norm gives that reading. With write = 0
  the association is erased.

  Args:
    state: S [K, V].
    key: [K].
    value: [V].
    erase: b, a number or one per key channel, in [0, 2].
    write: w, a number or one per value channel, in [0, 1].
  """
  k = jnp.asarray(key, jnp.float32)[None, None]
  v = jnp.asarray(value, jnp.float32)[None, None]
  b = jnp.broadcast_to(jnp.asarray(erase, jnp.float32), k.shape)
  w = jnp.broadcast_to(jnp.asarray(write, jnp.float32), v.shape)
  S = jnp.asarray(state, jnp.float32)[None, None]
  _, S = gdn2_step(k, k, v, jnp.zeros_like(k), b, w, S)
  return np.asarray(S[0, 0])


def read_keys(
  state: Float[Array | np.ndarray, "K V"], written: Rows
) -> Float[np.ndarray, "n K"]:
  """Keys under which vectors were written, by least squares.

  Minimises |S - sum_j k_j u_j^T| over the k_j; exact if S is such a sum and the
  u_j are linearly independent.

  Args:
    state: S [K, V].
    written: u [n, V], n <= V.

  Raises:
    ValueError: more vectors than value channels.
  """
  S, U = np.asarray(state, np.float64), np.asarray(written, np.float64)
  if len(U) > U.shape[1]:
    raise ValueError(
      f"written: {len(U)} vectors, expected at most V={U.shape[1]}"
    )
  return np.linalg.lstsq(U.T, S.T, rcond=None)[0]


def written_by_delta_rule(
  keys: Rows, values: Rows, *, erase: float = 1.0
) -> Float[np.ndarray, "n V"]:
  """Vectors u that `store` adds: the values less what each token erases.

  (I + T) U = V with T_rs = erase * k_r . k_s for r > s (section 3.3 without
  decay).
  """
  k, v = np.asarray(keys, np.float64), np.asarray(values, np.float64)
  T = np.tril(erase * (k @ k.T), -1)
  return np.linalg.solve(np.eye(len(k)) + T, v)


def at_cosines(
  key: Float[np.ndarray, "K"], cosines: Float[np.ndarray, "n"], seed: int = 0
) -> Float[np.ndarray, "n K"]:
  """Random unit keys with the given cosines to a unit key.

  Raises:
    ValueError: a cosine outside [-1, 1].
  """
  c = np.asarray(cosines, np.float64)[:, None]
  if np.abs(c).max() > 1:
    raise ValueError(f"cosines={np.abs(c).max()}: expected in [-1, 1]")
  # Another stream than unit_rows', which may have drawn the key itself.
  other = np.random.default_rng([seed, 1]).normal(size=(len(c), len(key)))
  other -= (other @ key)[:, None] * key
  other /= np.linalg.norm(other, axis=-1, keepdims=True)
  return (c * key + np.sqrt(1 - c**2) * other).astype(np.float32)


def private_key(keys: Rows, index: int) -> Float[np.ndarray, "K"]:
  """Direction d with d . k_index = 1 and d . k_j = 0 for the other keys.

  S + d (value - S^T k)^T changes one reading and leaves those of the other
  stored keys. |d| >= 1 is the size of that change relative to `edit`.

  Raises:
    ValueError: the keys are linearly dependent.
  """
  k = np.asarray(keys, np.float64)
  if np.linalg.matrix_rank(k) < len(k):
    raise ValueError(
      f"keys: {len(k)} keys of rank {np.linalg.matrix_rank(k)}, expected"
      " linearly independent ones"
    )
  return np.linalg.pinv(k)[:, index]


@dataclasses.dataclass(frozen=True)
class PrivateCost:
  """Cost of edits with private keys, by number of stored keys.

  Attributes:
    counts: Stored keys n.
    dim: K.
    norms: |d|, [draws, len(counts)].
    expected: 1 / sqrt(1 - (n - 1) / K): the squared part of a random unit key
      outside the span of n - 1 others is 1 - (n - 1) / K on average.
  """

  counts: np.ndarray
  dim: int
  norms: np.ndarray
  expected: np.ndarray


def private_costs(dim: int, draws: int = 32) -> PrivateCost:
  """Measures |d| of private keys among random unit keys, n = 1 to K - 1."""
  counts = np.arange(1, dim)
  norms = np.array(
    [
      [
        np.linalg.norm(private_key(unit_rows(s, n, dim), 0))
        for n in counts.tolist()
      ]
      for s in range(draws)
    ]
  )
  return PrivateCost(counts, dim, norms, 1 / np.sqrt(1 - (counts - 1) / dim))
