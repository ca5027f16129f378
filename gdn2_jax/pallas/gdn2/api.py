"""Differentiable functions of the GDN-2 kernels for Hopper.

The kernels take whole chunks and whole tiles of channels. Arrays are padded to
these with tokens of kind 0, which do not change the state, and with channels of
zeros in q, k, g, b or in v, w, which stay zero; so padding changes no result.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gdn2_jax.kernels import target
from gdn2_jax.pallas.gdn2 import step
from gdn2_jax.pallas.gdn2.backward import backward
from gdn2_jax.pallas.gdn2.forward import forward
from gdn2_jax.pallas.partition import over_batch_and_heads

CHUNK = 64
MAX_KEY_DIM = 128
_VALUE_TILE = 64
_DTYPES = ("bfloat16", "float16")

_TOKENS = 6 * ("b.h",)  # q k v g b w


def unsupported_reason(K: int, V: int, *dtypes: Any) -> str | None:
  """Reason that the kernels cannot run a call, or None.

  V counts the channels of all value heads of a key head; dtypes are those of q,
  k, v, b and w.
  """
  names = sorted({jnp.dtype(dtype).name for dtype in dtypes})
  if len(names) > 1:
    return f"q, k, v, b and w differ in dtype: {', '.join(names)}"
  if names[0] not in _DTYPES:
    return (
      f"dtype {names[0]}: tensor cores multiply 16-bit operands,"
      f" {' or '.join(_DTYPES)}"
    )
  if K % 16 or K > MAX_KEY_DIM:
    return f"K = {K}, expected a multiple of 16 up to {MAX_KEY_DIM}"
  if V % 16:
    return f"{V} value channels per key head, expected a multiple of 16"
  return None


def gdn2_mosaic_gpu(
  q: Float[Array, "B T H K"],
  k: Float[Array, "B T H K"],
  v: Float[Array, "B T H V"],
  g: Float[Array, "B T H K"],
  b: Float[Array, "B T H K"],
  w: Float[Array, "B T H V"],
  state: Float[Array, "B H K V"],
  kinds: Int[Array, "B T"] | None,
  scale: float,
  *,
  rates: Float[Array, "B H 2 K"] | None = None,
  erase_scale: float = 1.0,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
  """Chunkwise Eq. 10 by the kernels, differentiable in all but kinds.

  Arguments are those of gdn2 with folded value heads, except
    kinds: Kinds of tokens (blocks.PADDING, TOKEN, RESTART); None: all TOKEN.
    rates: -exp(A_log) and dt_bias, float32, to have the kernels compute norms
      and gates; q, k, g, b and w are then as in projected.py, in one dtype.
    erase_scale: Factor on the erase gate, with rates.
  """
  (B, T, _, K), V = q.shape, v.shape[-1]
  is_token = None
  if kinds is None:
    kinds = jnp.ones((B, T), jnp.int32)
  else:
    # The kernels mask arrays with a key axis. v, w and the gradient of o, which
    # may hold NaN at padding, are masked here, where XLA fuses it.
    is_token = (kinds != 0)[:, :, None, None]
  v, w = _zero_unless(is_token, v), _zero_unless(is_token, w)
  tokens = -T % CHUNK
  # The kernels take one or two tiles of key channels.
  keys, values = (64 if K <= 64 else MAX_KEY_DIM) - K, -V % _VALUE_TILE

  def pad(x, channels):
    widths = ((0, 0), (0, tokens), (0, 0), (0, channels))
    return jnp.pad(x, widths) if tokens or channels else x

  o, final = _differentiable(
    *(pad(x, keys) for x in (q, k)),
    pad(v, values),
    pad(g if rates is not None else g.astype(jnp.float32), keys),
    pad(b, keys),
    pad(w, values),
    None if rates is None else jnp.pad(rates, (*3 * ((0, 0),), (0, keys))),
    jnp.pad(state, ((0, 0), (0, 0), (0, keys), (0, values))),
    jnp.pad(kinds.astype(jnp.int32), ((0, 0), (0, tokens))),
    (scale, erase_scale),
  )
  o = _zero_unless(is_token, o[:, :T, :, :V])
  return o, final[:, :, :K, :V]


def _zero_unless(is_token, x):
  if is_token is None:
    return x
  return jnp.where(is_token, x, jnp.zeros((), x.dtype))


def _sequence(q, k, v, g, b, w, rates, state, kinds, scales):
  run = _forward(scales, save=False)
  o, final, _ = run(q, k, v, g, b, w, rates, state, kinds)
  return o, final


def _sequence_fwd(q, k, v, g, b, w, rates, state, kinds, scales):
  inputs = (q, k, v, g, b, w, rates)
  o, final, saved = _forward(scales, save=True)(*inputs, state, kinds)
  return (o, final), (inputs, kinds, saved)


def _sequence_bwd(scales, residuals, cotangents):
  inputs, kinds, saved = residuals
  gradients = _backward(scales)(*inputs, kinds, saved, *cotangents)
  return (*gradients, None)


_differentiable = target.differentiable(
  _sequence, _sequence_fwd, _sequence_bwd, static=9
)


def _forward(scales, *, save):
  scale, erase_scale = scales
  return over_batch_and_heads(
    forward,
    (*_TOKENS, "bh", "bh", "b"),
    ("b.h", "bh", "bh"),
    scale=scale,
    erase_scale=erase_scale,
    save=save,
  )


def _backward(scales):
  scale, erase_scale = scales
  return over_batch_and_heads(
    backward,
    (*_TOKENS, "bh", "b", "bh", "b.h", "bh"),
    (*_TOKENS, "bh", "bh"),
    scale=scale,
    erase_scale=erase_scale,
  )


def gdn2_step_mosaic_gpu(
  q: Float[Array, "B H K"],
  k: Float[Array, "B H K"],
  v: Float[Array, "B HV V"],
  g: Float[Array, "B H K"],
  b: Float[Array, "B H K"],
  w: Float[Array, "B HV V"],
  states: Float[Array, "N B HV K V"],
  layer: Int[Array, ""] | int,
  scale: float,
) -> tuple[Float[Array, "B HV V"], Float[Array, "N B HV K V"]]:
  """Kernel of step.py, split over devices; not differentiable."""
  H = q.shape[1]

  def grouped(x):
    return x.reshape(x.shape[0], H, -1, *x.shape[2:])

  of_layers = states.reshape(*states.shape[:2], H, -1, *states.shape[3:])
  run = over_batch_and_heads(
    _step_of_groups, (*6 * ("bh",), ".bh", ""), ("bh", ".bh"), scale=scale
  )
  o, new = run(
    q, k, grouped(v), g, b, grouped(w), of_layers, jnp.asarray(layer, jnp.int32)
  )
  return o.reshape(v.shape), new.reshape(states.shape)


def _step_of_groups(q, k, v, g, b, w, states, layer, *, scale):
  """Kernel on [B, H, HV // H, ...], where all operands share the head axis."""
  B, H, G = v.shape[:3]
  v, w = (x.reshape(B, H * G, -1) for x in (v, w))
  shape = states.shape
  states = states.reshape(shape[0], B, H * G, *shape[4:])
  o, states = step.gdn2_step_mosaic_gpu(q, k, v, g, b, w, states, layer, scale)
  return o.reshape(B, H, G, -1), states.reshape(shape)
