"""Recurrent state over time, and effects of an overwrite on other values."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from gdn2_jax.ops.gdn2.api import MIN_HEAD_DIM, gdn2


def states(
  q: Float[Array | np.ndarray, "B T H K"],
  k: Float[Array | np.ndarray, "B T H K"],
  v: Float[Array | np.ndarray, "B T HV V"],
  g: Float[Array | np.ndarray, "B T H K"],
  b: Float[Array | np.ndarray, "B T H K"],
  w: Float[Array | np.ndarray, "B T HV V"],
  *,
  every: int = 1,
  segment_ids: Int[Array | np.ndarray, "B T"] | None = None,
) -> Float[np.ndarray, "N B HV K V"]:
  """Returns the states after every `every` tokens; arguments as `gdn2`.

  Returns:
    S [N, B, HV, K, V] after tokens every, 2 every, ... and T, so that
    N = ceil(T / every).

  Raises:
    ValueError: every < 1, or as `gdn2`.
  """
  if every < 1:
    raise ValueError(f"every={every}: expected at least 1")
  if segment_ids is None:
    segment_ids = np.ones(k.shape[:2], np.int32)
  B, _, _, K = k.shape
  state = jnp.zeros((B, v.shape[2], K, v.shape[3]), jnp.float32)
  pieces = [_pieces(x, every) for x in (q, k, v, g, b, w, segment_ids)]
  return np.asarray(_scan_pieces(state, *pieces))


def _pieces(x, every):
  """Cuts [B, T, ...] into [N, B, every, ...], the end filled with zeros."""
  # Segment id 0 is padding, which does not change the state.
  x = np.asarray(x)
  B, T = x.shape[:2]
  fill = [(0, 0)] * x.ndim
  fill[1] = (0, -T % every)
  x = np.pad(x, fill).reshape(B, -1, every, *x.shape[2:])
  return np.moveaxis(x, 1, 0)


@jax.jit
def _scan_pieces(state, *pieces):
  def read(carry, piece):
    state, last = carry
    *arrays, ids = piece
    # gdn2 continues the state with the first segment of a call; a border
    # between two pieces has to reset the state here.
    real = ids != 0
    first = jnp.take_along_axis(ids, jnp.argmax(real, 1)[:, None], 1)[:, 0]
    starts_anew = real.any(1) & (last != 0) & (first != last)
    state = jnp.where(starts_anew[:, None, None, None], 0.0, state)
    _, state = gdn2(*arrays, state=state, segment_ids=ids)
    end = ids.shape[1] - 1 - jnp.argmax(real[:, ::-1], 1)
    final = jnp.take_along_axis(ids, end[:, None], 1)[:, 0]
    return (state, jnp.where(real.any(1), final, last)), state

  last = jnp.zeros(state.shape[0], pieces[-1].dtype)
  return lax.scan(read, (state, last), pieces)[1]


def state_norm(
  state: Float[Array | np.ndarray, "*heads K V"],
) -> Float[np.ndarray, "*heads"]:
  """Frobenius norm of every head's state."""
  norm = np.linalg.norm(np.asarray(state, np.float64), axis=(-2, -1))
  return np.asarray(norm)  # NumPy returns a scalar for a single head


def effective_rank(
  state: Float[Array | np.ndarray, "*heads K V"],
) -> Float[np.ndarray, "*heads"]:
  """Effective rank: exp of the entropy of the normalised singular values.

  r equal singular values give r; a state of zeros gives 0.
  """
  sigma = np.linalg.svd(np.asarray(state, np.float64), compute_uv=False)
  total = sigma.sum(-1, keepdims=True)
  p = sigma / np.where(total == 0, 1, total)
  # 0 log 0 = 0: the logarithm of 1 replaces that of 0.
  entropy = -(p * np.log(np.where(p == 0, 1, p))).sum(-1)
  return np.where(total[..., 0] == 0, 0.0, np.exp(entropy))


_OWN, _SHARED = 6, 4  # channels of a key: its own, common to both
_K = _V = MIN_HEAD_DIM
assert _K == 2 * _OWN + _SHARED


@dataclasses.dataclass(frozen=True)
class Overwrite:
  """Readings with two keys before and after the overwrite of one value.

  Attributes:
    before: [..., 2, 3]. Row 0 is the reading with k1, row 1 that with k2; the
      columns are the coefficients of v1, the old v2 and the new v2.
    after: the same, after the overwrite.
  """

  before: Float[np.ndarray, "*sweep 2 3"]
  after: Float[np.ndarray, "*sweep 2 3"]


def overwrite(
  cosine: float | int | np.ndarray,
  *,
  erase_own: float | int | np.ndarray,
  erase_shared: float | int | np.ndarray,
  write: float | int | np.ndarray,
) -> Overwrite:
  """Stores v1 under k1 and v2 under k2, then overwrites v2 by a new value.

  The keys are unit vectors that overlap on some key channels and own the
  others alone; the values are orthonormal. Both are stored by plain writes
  (b = 0, w = 1, g = 0), so S = k1 v1^T + k2 v2^T; only the gates of the
  overwriting token differ. With e_i = (b * k2) . k_i, Eq. 10 gives

    S + k2 (w v2' - e_1 v1 - e_2 v2)^T

  Arguments may be arrays, which are broadcast against each other.

  Args:
    cosine: k1 . k2, in [0, 1).
    erase_own: b on the channels of k2 alone, in [0, 2].
    erase_shared: b on the channels of both keys, in [0, 2].
    write: w on all value channels, in [0, 1].

  Raises:
    ValueError: an argument outside its range.
  """
  numbers = {
    "cosine": (cosine, 0, np.nextafter(1, 0)),
    "erase_own": (erase_own, 0, 2),
    "erase_shared": (erase_shared, 0, 2),
    "write": (write, 0, 1),
  }
  for name, (value, low, high) in numbers.items():
    if not np.all((low <= np.asarray(value)) & (np.asarray(value) <= high)):
      top = "1)" if name == "cosine" else f"{high}]"
      raise ValueError(f"{name}={value}: expected in [{low}, {top}")
  arrays = np.broadcast_arrays(*(value for value, _, _ in numbers.values()))
  shape = arrays[0].shape
  o = _write_read_overwrite_read(*(a.reshape(-1) for a in arrays))
  read = np.asarray(o)[:, :, 0, :3].reshape(*shape, 7, 3)
  return Overwrite(before=read[..., 2:4, :], after=read[..., 5:7, :])


def _write_read_overwrite_read(cosine, erase_own, erase_shared, write):
  """Outputs [B, 7, 1, V] of: write, write, read, read, overwrite, read, read.

  A token whose gates are all 0 leaves the state as it is and only reads.
  """
  B = len(cosine)
  own = np.sqrt((1 - cosine) / _OWN)[:, None] * np.ones(_OWN)
  shared = np.sqrt(cosine / _SHARED)[:, None] * np.ones(_SHARED)
  nothing = np.zeros((B, _OWN))
  k1 = np.concatenate([own, shared, nothing], -1)
  k2 = np.concatenate([nothing, shared, own], -1)
  none_K = np.zeros((B, _K))
  b_K = np.concatenate(
    [
      nothing,
      erase_shared[:, None] * np.ones(_SHARED),
      erase_own[:, None] * np.ones(_OWN),
    ],
    -1,
  )
  none_V, all_V = np.zeros((B, _V)), np.ones((B, _V))
  v1, v2, new = (np.broadcast_to(row, (B, _V)) for row in np.eye(_V)[:3])
  tokens = [  # q = k, v, b, w
    (k1, v1, none_K, all_V),
    (k2, v2, none_K, all_V),
    (k1, none_V, none_K, none_V),
    (k2, none_V, none_K, none_V),
    (k2, new, b_K, write[:, None] * all_V),
    (k1, none_V, none_K, none_V),
    (k2, none_V, none_K, none_V),
  ]
  k, v, b, w = (
    np.stack(column, 1)[:, :, None].astype(np.float32)
    for column in zip(*tokens, strict=True)
  )
  o, _ = _gdn2_unit_scale(k, k, v, np.zeros_like(k), b, w)
  return o


_gdn2_unit_scale = jax.jit(functools.partial(gdn2, scale=1.0))
