"""Gated DeltaNet-2 on Hopper: the kernels as one differentiable function.

The kernels take whole chunks and whole tiles of channels. A token of kind 0
leaves the state alone, and a channel of zeros in q, k, g, b or in v, w stays
zero, so that padding to them changes no result.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gdn2_jax.kernels import target
from gdn2_jax.pallas.partition import over_batch_and_heads

CHUNK = 64
MAX_KEY_DIM = 128
_VALUE_TILE = 64
_DTYPES = ("bfloat16", "float16")

_TOKENS = 6 * ("b.h",)  # q k v g b w


def unsupported_reason(K: int, V: int, *dtypes: Any) -> str | None:
  """Why the kernels cannot run such a call, or None.

  Args:
    K: Key channels of a head.
    V: Value channels of all the value heads of a key head.
    *dtypes: Of q, k, v, b and w.
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
    return f"{V} value channels to a key head, expected a multiple of 16"
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

  Args:
    q: Queries, of the dtype of k, v, b and w; see unsupported_reason.
    k: Keys.
    v: Values.
    g: Log-decay, taken in float32.
    b: Erase gate.
    w: Write gate.
    state: Incoming state, float32.
    kinds: 0 padding, 1 token, 2 token that the state restarts at; None is all
      1.
    scale: Factor on the output.
    rates: -exp(A_log) and dt_bias, float32, if the kernels are to compute
      norms and gates: the others are then as projected.py takes them, all of
      one dtype.
    erase_scale: Factor on the erase gate, with rates.

  Returns:
    o in the dtype of v, and the final state.
  """
  (B, T, _, K), V = q.shape, v.shape[-1]
  is_token = None
  if kinds is None:
    kinds = jnp.ones((B, T), jnp.int32)
  else:
    # The kernels mask what has a key axis. What stands in v, w and the gradient
    # of o at padding (also NaN) goes here, where XLA fuses it with its source.
    is_token = (kinds != 0)[:, :, None, None]
  v, w = _zero_unless(is_token, v), _zero_unless(is_token, w)
  tokens = -T % CHUNK
  # One tile of keys, or two.
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


def _kernels():
  # Not at the top: what a call needs can be asked without the kernels.
  from gdn2_jax.pallas.gdn2.backward import backward
  from gdn2_jax.pallas.gdn2.forward import forward

  return forward, backward


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
    _kernels()[0],
    (*_TOKENS, "bh", "bh", "b"),
    ("b.h", "bh", "bh"),
    scale=scale,
    erase_scale=erase_scale,
    save=save,
  )


def _backward(scales):
  scale, erase_scale = scales
  return over_batch_and_heads(
    _kernels()[1],
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
  state: Float[Array, "B HV K V"],
  scale: float,
) -> tuple[Float[Array, "B HV V"], Float[Array, "B HV K V"]]:
  """One token of Eq. 10 by the kernel; not differentiable.

  Args:
    q: Query, as in pallas/gdn2/step.py, whose call this is on many devices.
    k: Key.
    v: Value, HV a multiple of H.
    g: Log-decay.
    b: Erase gate.
    w: Write gate.
    state: Incoming state, float32.
    scale: Factor on the output.

  Returns:
    o in the dtype of v, and the new state.
  """
  H = q.shape[1]

  def grouped(x):
    return x.reshape(x.shape[0], H, -1, *x.shape[2:])

  step = over_batch_and_heads(
    _step_of_groups, 7 * ("bh",), 2 * ("bh",), scale=scale
  )
  o, new = step(q, k, grouped(v), g, b, grouped(w), grouped(state))
  return o.reshape(v.shape), new.reshape(state.shape)


def _step_of_groups(q, k, v, g, b, w, state, *, scale):
  """The kernel on [B, H, HV // H, ...]: one head axis for all operands."""
  from gdn2_jax.pallas.gdn2.step import gdn2_step_mosaic_gpu as kernel

  B, H, G = v.shape[:3]
  v, w, state = (x.reshape(B, H * G, *x.shape[3:]) for x in (v, w, state))
  o, state = kernel(q, k, v, g, b, w, state, scale)
  return tuple(x.reshape(B, H, G, *x.shape[2:]) for x in (o, state))
