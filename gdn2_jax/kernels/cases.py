"""The small cases on which kernels are compared with "xla"."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdn2_jax.kernels.self_check import Case

# Long enough that rings of buffers are used again; the end is padding.
_B, _T, _H, _CHANNELS = 2, 313, 4, 128


def sequence(dtype: Any) -> Case:
  """For f(q, k, v, g, b, w, state, segment_ids, scale) -> (o, state)."""
  inputs, cotangents = _recurrence(dtype)
  segment_ids, scale = _segment_ids(), _CHANNELS**-0.5

  def outputs_of(run, *inputs):
    def outputs(*inputs):
      return run(*inputs, segment_ids, scale)

    return _with_gradients(outputs, inputs, cotangents)

  names = ("o", "state", "dq", "dk", "dv", "dg", "db", "dw", "dstate")
  return Case(names, inputs, outputs_of)


def step(dtype: Any) -> Case:
  """For f(q, k, v, g, b, w, states, layer, scale) -> (o, states), one token."""
  (*tokens, state), _ = _recurrence(dtype)
  inputs = (*(x[:, 0] for x in tokens), jnp.stack([state, 2 * state]))

  def outputs_of(run, *inputs):
    return run(*inputs, jnp.int32(1), _CHANNELS**-0.5)

  return Case(("o", "states"), inputs, outputs_of)


def layer_step(dtype: Any) -> Case:
  """For f(*operands.LayerStep) -> (y, tails_q, tails_k, tails_v, states)."""
  rng = np.random.default_rng(0)
  token, head = (_B, _H, _CHANNELS), (_H, _CHANNELS)
  taps, tails = (4, *head), (2, _B, 3, *head)
  shapes = (*7 * (token,), *3 * (taps,), (_H,), head, head, (_CHANNELS,))
  shapes = (*shapes, *3 * (tails,), (2, _B, _H, _CHANNELS, _CHANNELS))
  exact = (10, 11, 17)  # a_log, dt_bias and states
  inputs = tuple(
    _normal(rng, shape, jnp.float32 if n in exact else dtype)
    for n, shape in enumerate(shapes)
  )
  names = ("y", "tails_q", "tails_k", "tails_v", "states")
  return Case(names, inputs, lambda run, *p: run(*p, jnp.int32(1)))


def gated_norm(dtype: Any) -> Case:
  """For f(x, gate, weight, bias) -> y."""
  rng = np.random.default_rng(0)
  tokens, vectors = (_B, _T, _H, _CHANNELS), ((_CHANNELS,), (_H, _CHANNELS))
  x, gate, dy = (_normal(rng, tokens, dtype) for _ in range(3))
  inputs = x, gate, *(_normal(rng, shape, jnp.float32) for shape in vectors)

  def outputs_of(run, *inputs):
    return _with_gradients(lambda *a: (run(*a),), inputs, (dy,))

  return Case(("y", "dx", "dgate", "dweight", "dbias"), inputs, outputs_of)


def attention(dtype: Any) -> Case:
  """For f(q, k, v, segment_ids, window, scale) -> o."""
  rng = np.random.default_rng(0)
  shape = (_B, _T, _H, _CHANNELS)
  q, k, v, do = (_normal(rng, shape, dtype) for _ in range(4))
  # Here a segment ends where padding begins.
  segment_ids = _segment_ids().at[1, 40:].set(2)
  scale = _CHANNELS**-0.5

  def outputs_of(run, *inputs):
    def outputs(*inputs):
      return (run(*inputs, segment_ids, 2 * _T // 3, scale),)

    return _with_gradients(outputs, inputs, (do,))

  return Case(("o", "dq", "dk", "dv"), (q, k, v), outputs_of)


def short_conv(dtype: Any) -> Case:
  """For f(x, kernel, state, segment_ids) -> y."""
  rng = np.random.default_rng(0)
  taps, channels = 4, _H * _CHANNELS
  shapes = (_B, _T, channels), (taps, channels), (_B, taps - 1, channels)
  inputs = tuple(_normal(rng, shape, dtype) for shape in shapes)
  dy, segment_ids = _normal(rng, shapes[0], dtype), _segment_ids()

  def outputs_of(run, *inputs):
    return _with_gradients(lambda *a: (run(*a, segment_ids),), inputs, (dy,))

  return Case(("y", "dx", "dkernel", "dstate"), inputs, outputs_of)


def _with_gradients(outputs_of, inputs, cotangents):
  outputs, pullback = jax.vjp(outputs_of, *inputs)
  cotangents = [
    d.astype(x.dtype) for d, x in zip(cotangents, outputs, strict=True)
  ]
  return (*outputs, *pullback(tuple(cotangents)))


def _segment_ids():
  segment_ids = np.ones((_B, _T), np.int32)
  segment_ids[0, 70:] = 2  # a restart inside a chunk
  segment_ids[1, 30:40] = 0  # and padding
  return jnp.asarray(segment_ids)


def _normal(rng, shape, dtype):
  return jnp.asarray(rng.standard_normal(shape).astype(np.float32), dtype)


def _recurrence(dtype):
  """q k v g b w state, and cotangents, from a fixed seed."""
  rng = np.random.default_rng(0)
  tokens, states = (_B, _T, _H, _CHANNELS), (_B, _H, _CHANNELS, _CHANNELS)

  def normal(shape=tokens):
    return rng.standard_normal(shape).astype(np.float32)

  def unit():
    x = normal()
    return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True))

  def gate():
    return 1 / (1 + np.exp(-normal()))

  # Heads from almost no decay to a state that is gone after a token.
  fastest = np.array([-1e-3, -0.1, -5.0, -50.0], np.float32)[:, None]
  g = rng.uniform(0, 1, tokens).astype(np.float32) * fastest
  q, k, v, b, w = (
    jnp.asarray(x, dtype) for x in (unit(), unit(), normal(), gate(), gate())
  )
  cotangents = jnp.asarray(normal(), dtype), jnp.asarray(normal(states))
  inputs = (q, k, v, jnp.asarray(g), b, w, jnp.asarray(normal(states)))
  return inputs, cotangents
