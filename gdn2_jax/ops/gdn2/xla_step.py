"""One token of Gated DeltaNet-2 with a single read of the state.

Legend: B batch, H key heads, K key channels, V value channels of all the value
heads of a key head.
"""

import math

import jax.numpy as jnp
from jax import export, lax
from jaxtyping import Array, Float

from gdn2_jax.kernels.target import backend
from gdn2_jax.ops.gdn2.xla_tree import matmul

# Measured on a CPU: once the states of a call exceed the last-level cache,
# working on groups of heads keeps each state in cache between its read and its
# update. For smaller states XLA's matrix products are faster than sums.
_CACHE_BYTES = 1 << 24
_GROUP = 2  # heads at a time: 128 KiB for states of 128 x 128
_PIECES = 8  # partial sums over K


def gdn2_step_xla(
  q: Float[Array, "B H K"],
  k: Float[Array, "B H K"],
  v: Float[Array, "B H V"],
  g: Float[Array, "B H K"],
  b: Float[Array, "B H K"],
  w: Float[Array, "B H V"],
  state: Float[Array, "B H K V"],
  scale: float,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
  """One token of Eq. 10, reading the state once for erase and output.

  With alpha = exp(g) and e = b*k, S'^T q = S^T (alpha*q) + (q.k) u where
  u = w*v - S^T (alpha*e), so both products use the old state.
  """
  out_dtype = v.dtype
  q, k, v, g, b, w = (x.astype(state.dtype) for x in (q, k, v, g, b, w))
  token = (q * scale, k, v, g, b, w)
  o, state = (_step_by_groups if _by_groups(state) else _step)(token, state)
  return o.astype(out_dtype), state


def _by_groups(state):
  # A program exported for any batch size cannot compare sizes.
  if backend() != "cpu" or export.is_symbolic_dim(state.shape[0]):
    return False
  return state.nbytes >= _CACHE_BYTES


def _step_by_groups(token, state):
  """Computes `_step` for a few heads at a time, each updated in place.

  XLA copies a slice of the carried state before a dot; elementwise code reads
  it in place. So S^T e and S^T q are written as sums: first over the pieces of
  K, then over the rows of a piece.
  """
  q, k, v, g, b, w = token
  B, H, K, V = state.shape
  size = math.gcd(B * H, _GROUP)
  rows = K // math.gcd(K, _PIECES)
  alpha = jnp.exp(g)
  eq = jnp.stack([alpha * b * k, alpha * q], axis=-2)
  qk = (q * k).sum(-1, keepdims=True)

  def one_group(states, xs):
    n, eq, qk, wv, alpha, k = xs

    def product(start):
      piece = lax.dynamic_slice(states, (n, 0, start, 0), (1, size, rows, V))
      piece = piece.reshape(size, 1, rows, V)
      return eq[:, :, start : start + rows, None] * piece

    # Without the barriers XLA could recompute a sum for each of its uses.
    sums = sum(product(start) for start in range(0, K, rows))
    sums = lax.optimization_barrier(sums)
    eq_S = sum(sums[:, :, row] for row in range(rows))
    eq_S = lax.optimization_barrier(eq_S)
    u = wv - eq_S[:, 0]
    o = eq_S[:, 1] + qk * u
    # The leading axis of size one stays: XLA copies a slice that is reshaped.
    S = lax.dynamic_slice_in_dim(states, n, 1)
    S = alpha[None, ..., None] * S + (k[..., None] * u[:, None, :])[None]
    return lax.dynamic_update_slice_in_dim(states, S, n, axis=0), o

  def groups(x):
    return x.reshape(B * H // size, size, *x.shape[2:])

  xs = [groups(x) for x in (eq, qk, w * v, alpha, k)]
  numbers = jnp.arange(B * H // size)
  states, o = lax.scan(one_group, groups(state), (numbers, *xs))
  return o.reshape(v.shape), states.reshape(state.shape)


def _step(token, state):
  q, k, v, g, b, w = token
  alpha = jnp.exp(g)
  eq_S = matmul(jnp.stack([alpha * b * k, alpha * q], axis=-2), state)
  u = w * v - eq_S[..., 0, :]
  o = eq_S[..., 1, :] + (q * k).sum(-1, keepdims=True) * u
  return o, alpha[..., None] * state + k[..., None] * u[..., None, :]
