"""Kernels' signatures without kernels: the token scan does the work."""

import jax
import jax.numpy as jnp

from gdn2_jax.ops.gdn2.reference import gdn2_reference


def _segments(kinds):
  return jnp.where(kinds == 0, 0, 1 + jnp.cumsum(kinds == 2, axis=1))


def _check_shapes(q, v, kinds):
  (B, T, _, K), V = q.shape, v.shape[-1]
  assert T % 64 == 0 and K in (64, 128) and V % 64 == 0
  assert kinds.shape == (B, T) and kinds.dtype == jnp.int32


def _activated(q, k, g, b, w, rates, erase_scale):
  """Norms and gates as the kernels compute them (pallas/projected.py)."""
  if rates is None:
    return q, k, g, b, w

  def unit(x):
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-6)

  rate, dt_bias = rates[:, None, :, 0], rates[:, None, :, 1]
  g = rate * jax.nn.softplus(g.astype(jnp.float32) + dt_bias)
  b, w = (jax.nn.sigmoid(x.astype(jnp.float32)) for x in (b, w))
  return unit(q), unit(k), g, erase_scale * b, w


def _run(q, k, v, g, b, w, rates, state, kinds, scale, erase_scale):
  q, k, g, b, w = _activated(q, k, g, b, w, rates, erase_scale)
  return gdn2_reference(q, k, v, g, b, w, state, _segments(kinds), scale)


def forward(q, k, v, g, b, w, rates, state, kinds, *, scale, erase_scale, save):
  _check_shapes(q, v, kinds)
  assert state.dtype == jnp.float32
  assert g.dtype == (jnp.float32 if rates is None else q.dtype)
  inputs = (q, k, v, g, b, w, rates, state)
  o, final = _run(*inputs, kinds, scale, erase_scale)
  if not save:
    return o, final, ()
  # What backward needs comes out of the residuals and nowhere else.
  chunks = (q.shape[0], q.shape[2], q.shape[1] // 64)
  states = jnp.broadcast_to(state[:, :, None], (*chunks, *state.shape[2:]))
  return o, final, (jnp.zeros((*chunks, 64, 64), q.dtype), states)


def backward(
  q, k, v, g, b, w, rates, kinds, residuals, do, dfinal, *, scale, erase_scale
):
  _check_shapes(q, v, kinds)
  A, states = residuals
  assert A.shape[-2:] == (64, 64)

  def call(*inputs):
    return _run(*inputs, kinds, scale, erase_scale)

  inputs = (q, k, v, g, b, w, rates, states[:, :, 0])
  _, pullback = jax.vjp(call, *inputs)
  return pullback((do, dfinal))


def wrong_backward(*args, **kwargs):
  dq, dk, dv, dg, *others = backward(*args, **kwargs)
  return dq, dk, dv, -dg, *others


def wrong_forward(*args, **kwargs):
  o, *others = forward(*args, **kwargs)
  return o * jnp.float32(1.1).astype(o.dtype), *others


def nan_forward(*args, **kwargs):
  o, *others = forward(*args, **kwargs)
  return o.at[0, 0, 0, 0].set(jnp.nan), *others


def broken_forward(*args, **kwargs):
  raise RuntimeError("no such chip")
