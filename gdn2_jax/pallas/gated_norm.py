r"""Gated norm of a layer's output on a GPU, forward and backward.

With n = x / sqrt(mean x^2 + eps), a = act(gate + bias) (section 3.5):

  y       = n * weight * a
  dgate   = dy * n * weight * act'(gate + bias)
  dx      = (dn - n mean(dn * n)) / sqrt(mean x^2 + eps),  dn = dy * weight * a
  dweight = sum over tokens and heads of dy * n * a
  dbias   = sum over tokens of dgate

Every array is read once and every result is written once; sums are float32. The
kernels are limited by memory bandwidth and use no shared memory: a thread holds
16 bytes of a row, the lanes of a row sum by shuffles, and no warp waits for
another.

Legend: B batch, T tokens, H heads, V channels of a head, R rows that a block of
four warps loads at a time.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from gdn2_jax.pallas import blocks
from gdn2_jax.pallas.partition import over_batch_and_heads
from gdn2_jax.pallas.projected import sigmoids

CHANNELS = (64, 128, 256)  # V / 8 lanes per row: a power of two, at most 32
_DTYPES = ("bfloat16", "float16")
_VECTOR = 8
_WARPS, _LANES = 4, 32
_BLOCKS = (256, 128, 64)  # tokens per block; more mean fewer partial sums
_AT_A_TIME = 2  # loads of R rows in flight


def unsupported_reason(x: Any, gate: Any) -> str | None:
  """Reason that the kernels cannot run a call with x and gate, or None."""
  if len(x.shape) != 4:
    return f"x has shape {x.shape}, expected [B, T, H, V]"
  if x.shape[1] < _BLOCKS[-1]:
    return f"T = {x.shape[1]}, expected at least {_BLOCKS[-1]} tokens"
  if x.shape[-1] not in CHANNELS:
    return f"V = {x.shape[-1]}, expected one of {CHANNELS}"
  names = sorted({jnp.dtype(a.dtype).name for a in (x, gate)})
  if len(names) > 1 or names[0] not in _DTYPES:
    return f"dtypes {', '.join(names)}, expected one of {', '.join(_DTYPES)}"
  return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def gated_rms_norm_mosaic_gpu(
  x: Float[Array, "B T H V"],
  gate: Float[Array, "B T H V"],
  weight: Float[Array, " V"],
  bias: Float[Array, "H V"],
  activation: str,
  eps: float,
) -> Float[Array, "B T H V"]:
  """Computes ops.norm.gated_rms_norm; see unsupported_reason for the limits."""
  return _forward(x, gate, weight, bias, activation, eps)[0]


def _forward(x, gate, weight, bias, activation, eps):
  run = over_batch_and_heads(
    forward,
    ("b.h", "b.h", "b", "bh"),
    ("b.h",),
    activation=activation,
    eps=eps,
  )
  (y,) = run(_whole(x), _whole(gate), _rows(x, weight), _rows(x, bias))
  return y[:, : x.shape[1]], (x, gate, weight, bias)


def _backward(activation, eps, residuals, dy):
  x, gate, weight, bias = residuals
  run = over_batch_and_heads(
    backward,
    ("b.h", "b.h", "b", "bh", "b.h"),
    ("b.h", "b.h", "b.h", "b.h"),
    activation=activation,
    eps=eps,
  )
  dx, dgate, dweights, dbiases = run(
    _whole(x),
    _whole(gate),
    _rows(x, weight),
    _rows(x, bias),
    _whole(dy.astype(x.dtype)),
  )
  dweight = dweights.sum(axis=(0, 1, 2, 3)).astype(weight.dtype)
  dbias = dbiases.sum(axis=(0, 1, 3)).astype(bias.dtype)
  T = x.shape[1]
  return dx[:, :T], dgate[:, :T], dweight, dbias


gated_rms_norm_mosaic_gpu.defvjp(_forward, _backward)


def _whole(x):
  """Pads x to whole blocks of tokens; zeros add nothing to any gradient."""
  tokens = -x.shape[1] % _BLOCKS[-1]
  return jnp.pad(x, ((0, 0), (0, tokens), (0, 0), (0, 0))) if tokens else x


def _rows(x, vector):
  """Repeats a vector per batch row, the axis that a call is split over."""
  return jnp.broadcast_to(
    vector.astype(jnp.float32)[None], (x.shape[0], *vector.shape)
  )


def forward(x, gate, weight, bias, *, activation, eps):
  """Output for whole blocks; weight [B, V] and bias [B, H, V] are float32."""
  body = functools.partial(_forward_body, activation=activation, eps=eps)
  call = _call("gated_norm", body, x, [_like(x)])
  return tuple(call(x, gate, weight, bias))


def backward(x, gate, weight, bias, dy, *, activation, eps):
  """dx, dgate, and parts [B, blocks, H, R, V] of dweight and dbias."""
  B, T, H, V = x.shape
  body = functools.partial(_backward_body, activation=activation, eps=eps)
  sums = blocks.struct((B, T // _block(T), H, _rows_of(V), V), jnp.float32)
  call = _call("gated_norm_grad", body, x, [_like(x), _like(gate), sums, sums])
  return tuple(call(x, gate, weight, bias, dy))


def _like(x):
  return blocks.struct(x.shape, x.dtype)


def _block(T):
  return next(n for n in _BLOCKS if T % n == 0)


def _call(name, body, x, out_type):
  B, T, H, _ = x.shape
  block = _block(T)

  def run(*refs):
    body(*refs, block=block)

  return blocks.call(
    name,
    run,
    out_type,
    grid=(B, H, T // block),
    grid_names=("row", "head", "block"),
  )


def _forward_body(
  x_gm, gate_gm, weight_gm, bias_gm, y_gm, *, block, activation, eps
):
  weight, bias = (
    _load_vector(weight_gm, "row"),
    _load_vector(bias_gm, "row", "head"),
  )

  def rows(here, _):
    n, _ = _normed(_load(x_gm, here), eps)
    act, _ = _activation(_load(gate_gm, here) + bias, activation)
    blocks.store_untiled(y_gm.at[here], (n * weight * act).astype(y_gm.dtype))

  _for_rows(x_gm, block, rows, None)


def _backward_body(
  x_gm,
  gate_gm,
  weight_gm,
  bias_gm,
  dy_gm,
  dx_gm,
  dgate_gm,
  dweight_gm,
  dbias_gm,
  *,
  block,
  activation,
  eps,
):
  weight, bias = (
    _load_vector(weight_gm, "row"),
    _load_vector(bias_gm, "row", "head"),
  )

  def rows(here, sums):
    x, gate, dy = (_load(ref, here) for ref in (x_gm, gate_gm, dy_gm))
    n, scale = _normed(x, eps)
    act, slope = _activation(gate + bias, activation)
    dgate = dy * n * weight * slope
    dn = dy * weight * act
    dx = (dn - n * _row_mean(dn * n)) * scale
    blocks.store_untiled(dgate_gm.at[here], dgate.astype(dgate_gm.dtype))
    blocks.store_untiled(dx_gm.at[here], dx.astype(dx_gm.dtype))
    more = dy * n * act, dgate
    return tuple(
      plgpu.layout_cast(a + b, _layout(V))
      for a, b in zip(sums, more, strict=True)
    )

  V = x_gm.shape[-1]
  zeros = jnp.zeros((_rows_of(V), V), jnp.float32)
  sums = _for_rows(
    x_gm, block, rows, 2 * (plgpu.layout_cast(zeros, _layout(V)),)
  )
  here = tuple(lax.axis_index(name) for name in ("row", "block", "head"))
  for ref, total in zip((dweight_gm, dbias_gm), sums, strict=True):
    blocks.store_untiled(ref.at[here], total)


def _for_rows(x_gm, block, rows, carry):
  """Loops carry = rows(index of R tokens of a head, carry) over a block."""
  row, head, here = (lax.axis_index(n) for n in ("row", "head", "block"))
  R = _rows_of(x_gm.shape[-1])
  first = here * block

  def some(i, carry):
    # Unrolled, so that the next rows load while these are computed.
    for n in range(_AT_A_TIME):
      tokens = pl.ds(first + (i * _AT_A_TIME + n) * R, R)
      carry = rows((row, tokens, head), carry)
    return carry

  return lax.fori_loop(0, block // (R * _AT_A_TIME), some, carry)


def _load(ref, here):
  x = plgpu.load(ref.at[here], layout=_layout(ref.shape[-1]), optimized=False)
  return x.astype(jnp.float32)


def _load_vector(ref, *axes):
  """Loads a vector and repeats it in every row: [R, V]."""
  V = ref.shape[-1]
  here = tuple(lax.axis_index(name) for name in axes)
  vector = plgpu.load(
    ref.at[here], layout=_layout(V).reduce(0), optimized=False
  )
  return lax.broadcast_in_dim(vector, (_rows_of(V), V), (1,))


def _normed(x, eps):
  """Normalised x, and the factor 1 / sqrt(mean x^2 + eps)."""
  scale = lax.rsqrt(_row_mean(x * x) + eps)
  return x * scale, scale


def _row_mean(x):
  """Mean over V, repeated in every column: [R, V]."""
  mean = x.sum(axis=1) * (1.0 / x.shape[1])
  return lax.broadcast_in_dim(mean, x.shape, (0,))


def _activation(gate, activation):
  """Activation of the gate, and its derivative."""
  s, rest = sigmoids(gate)
  slope = s * rest
  if activation == "sigmoid":
    return s, slope
  return gate * s, s + gate * slope


def _rows_of(V):
  """R, the number of rows that four warps load at once in 16-byte vectors."""
  return _WARPS * _LANES * _VECTOR // V


def _layout(V):
  """Register layout [R, V]: warps over rows, lanes over rows and vectors."""
  R = _rows_of(V)
  # The tiled shape is [4, 1, R / 4, V / 8, 1, 8].
  return blocks.register_layout(
    ((R, V), (R // _WARPS, V), (1, _VECTOR)), (-6,), (-4, -3)
  )


def aot_cases() -> list[tuple[str, Callable, list[jax.ShapeDtypeStruct]]]:
  """Representative calls: name, function, arguments."""
  cases = []
  for label, V, dtype, activation in (
    ("V=128", 128, "bfloat16", "silu"),
    ("V=64 float16", 64, "float16", "silu"),
    ("V=256 sigmoid", 256, "bfloat16", "sigmoid"),
  ):
    x = jax.ShapeDtypeStruct((4, 4096, 16, V), dtype)
    weight = jax.ShapeDtypeStruct((4, V), "float32")
    inputs = [x, x, weight, jax.ShapeDtypeStruct((4, 16, V), "float32")]
    options = {"activation": activation, "eps": 1e-5}
    for name, run, more in (
      ("gated norm", forward, []),
      ("gated norm gradient", backward, [x]),
    ):
      call = functools.partial(run, **options)
      cases.append((f"{name} {label}", call, inputs + more))
  return cases
