"""One token of Gated DeltaNet-2 in a single read of the state.

Legend: B batch, H key heads, K key channels, V value channels of all the value
heads of a key head.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from gdn2_jax.ops.gdn2_xla_tree import matmul

# Measured: where the states of a call outgrow the last-level cache of a CPU,
# row by row keeps each state in cache between its read and its update.
_CACHE_BYTES = 1 << 24


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
  """One token of Eq. 10 that reads the state once for erase and output.

  With alpha = exp(g) and e = b*k, S'^T q = S^T (alpha*q) + (q.k) u where
  u = w*v - S^T (alpha*e), so that both products come from the old state.
  """
  out_dtype = v.dtype
  q, k, v, g, b, w = (x.astype(state.dtype) for x in (q, k, v, g, b, w))
  token = (q * scale, k, v, g, b, w)
  if jax.default_backend() != "cpu" or state.nbytes <= _CACHE_BYTES:
    o, state = _step(token, state)
    return o.astype(out_dtype), state

  def one_row(state, xs):
    n, *token = xs
    S = lax.dynamic_index_in_dim(state, n, axis=0)
    o, S = _step([x[None] for x in token], S)
    return lax.dynamic_update_slice_in_dim(state, S, n, axis=0), o[0]

  rows = jnp.arange(state.shape[0])
  state, o = lax.scan(one_row, state, (rows, *token))
  return o.astype(out_dtype), state


def _step(token, state):
  q, k, v, g, b, w = token
  alpha = jnp.exp(g)
  eq_S = matmul(jnp.stack([alpha * b * k, alpha * q], axis=-2), state)
  u = w * v - eq_S[..., 0, :]
  o = eq_S[..., 1, :] + (q * k).sum(-1, keepdims=True) * u
  return o, alpha[..., None] * state + k[..., None] * u[..., None, :]
