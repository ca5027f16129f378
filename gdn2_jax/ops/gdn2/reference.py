"""Gated DeltaNet-2 token by token, exactly as in Eq. 10.

Legend (one head): q, k, g, b [K]; v, w [V]; S [K, V].

  S_t = (I - k_t (b_t*k_t)^T) Diag(exp(g_t)) S_{t-1} + k_t (w_t*v_t)^T
  o_t = scale * S_t^T q_t

Tests compare this implementation with recorded float64 results, and every other
implementation with this one. Gradients come from automatic differentiation.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from gdn2_jax.ops.segments import drop_padding, segment_starts

_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def _token(
  S_KV: Float[Array, "K V"], xs: tuple[Float[Array, " _"], ...]
) -> tuple[Float[Array, "K V"], Float[Array, " V"]]:
  """One token of one head (Eq. 10); q already carries the scale."""
  q_K, k_K, v_V, g_K, b_K, w_V = xs
  S_KV = jnp.exp(g_K)[:, None] * S_KV
  u_V = w_V * v_V - _matmul(b_K * k_K, S_KV)
  S_KV = S_KV + k_K[:, None] * u_V[None, :]
  return S_KV, _matmul(q_K, S_KV)


_token_BH = jax.vmap(jax.vmap(_token))


def gdn2_reference(
  q: Float[Array, "B T H K"],
  k: Float[Array, "B T H K"],
  v: Float[Array, "B T H V"],
  g: Float[Array, "B T H K"],
  b: Float[Array, "B T H K"],
  w: Float[Array, "B T H V"],
  state: Float[Array, "B H K V"],
  segment_ids: Int[Array, "B T"] | None,
  scale: float,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
  """Scans Eq. 10 over the tokens, computing in the dtype of `state`."""
  out_dtype = v.dtype
  q, k, v, g, b, w = (x.astype(state.dtype) for x in (q, k, v, g, b, w))
  if segment_ids is not None:
    # A padding token (all zero, g = 0) does not change S and reads zero; a
    # decay of exp(-inf) = 0 restarts the state.
    q, k, v, g, b, w = drop_padding(segment_ids, q, k, v, g, b, w)
    starts = segment_starts(segment_ids)[:, :, None, None]
    g = jnp.where(starts, -jnp.inf, g)
  xs = tuple(jnp.moveaxis(x, 1, 0) for x in (q * scale, k, v, g, b, w))
  state, o = lax.scan(_token_BH, state, xs)
  return jnp.moveaxis(o, 0, 1).astype(out_dtype), state


def gdn2_step_reference(
  q: Float[Array, "B H K"],
  k: Float[Array, "B H K"],
  v: Float[Array, "B H V"],
  g: Float[Array, "B H K"],
  b: Float[Array, "B H K"],
  w: Float[Array, "B H V"],
  state: Float[Array, "B H K V"],
  scale: float,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
  """One token of Eq. 10, computing in the dtype of `state`."""
  out_dtype = v.dtype
  q, k, v, g, b, w = (x.astype(state.dtype) for x in (q, k, v, g, b, w))
  state, o = _token_BH(state, (q * scale, k, v, g, b, w))
  return o.astype(out_dtype), state
