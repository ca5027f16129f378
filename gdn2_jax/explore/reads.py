"""Reads of a recurrence: weight of every earlier write in an output."""

import numpy as np
from jaxtyping import Float


def read_coefficients(
  q: Float[np.ndarray, "T K"],
  k: Float[np.ndarray, "T K"],
  g: Float[np.ndarray, "T K"],
  b: Float[np.ndarray, "T K"],
  *,
  scale: float | None = None,
) -> Float[np.ndarray, "T T"]:
  """Weight a_ts with which the output at token t reads the write at token s.

  Eq. 10 is linear in the state, S_t = A_t S_{t-1} + k_t (w_t * v_t)^T with
  A_t = (I - k_t (b_t * k_t)^T) Diag(exp(g_t)), and o_t = scale S_t^T q_t. From
  a state of zeros therefore, exactly,

    o_t = sum over s <= t of a_ts (w_s * v_s)
    a_ts = scale q_t^T A_t A_{t-1} ... A_{s+1} k_s

  The coefficients do not depend on v and w: all value heads of a key head share
  them. They may be negative.

  Args:
    q: queries of one head [T, K].
    k: keys [T, K].
    g: log-decay [T, K], <= 0.
    b: erase gate [T, K].
    scale: factor on the output, by default K^-0.5 as in `gdn2_jax.gdn2`.

  Returns:
    a [T, T], float64, 0 above the diagonal.
  """
  q, k, g, b = (np.asarray(x, np.float64) for x in (q, k, g, b))
  T, K = q.shape
  # Row t of p is scale q_t^T A_t ... A_{s+1}, for all t >= s at once.
  p = (K**-0.5 if scale is None else scale) * q
  a = np.zeros((T, T))
  for s in reversed(range(T)):
    later = p[s:]
    a[s:, s] = later @ k[s]
    later -= np.outer(a[s:, s], b[s] * k[s])
    later *= np.exp(g[s])
  return a


def contributions(
  a: Float[np.ndarray, "T T"],
  v: Float[np.ndarray, "T V"],
  w: Float[np.ndarray, "T V"],
) -> Float[np.ndarray, "T T"]:
  """Signed size a_ts |w_s * v_s| of what the output at t reads from token s.

  Args:
    a: `read_coefficients` of the head.
    v: values of one value head [T, V].
    w: write gate [T, V].

  Returns:
    [T, T], float64, in units of the output; the norm is Euclidean.
  """
  write = np.asarray(w, np.float64) * np.asarray(v, np.float64)
  return a * np.linalg.norm(write, axis=-1)
