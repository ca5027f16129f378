"""Normalisations over the last axis, in float32, with results in x.dtype.

l2_norm        x / sqrt(sum x^2 + eps)
rms_norm       x / sqrt(mean x^2 + eps) * weight
gated_rms_norm rms_norm(x) * act(gate + bias)
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from gdn2_jax.kernels import choice


def _compute_dtype(x):
  """float32, or float64 if x is float64."""
  return jnp.promote_types(x.dtype, jnp.float32)


def _check_float(name, x):
  if not jnp.issubdtype(x.dtype, jnp.floating) or x.ndim < 1:
    raise ValueError(
      f"{name}: expected a floating-point array with at least one axis, got "
      f"{x.dtype} of shape {x.shape}"
    )


def _check_eps(eps):
  if not eps > 0:
    raise ValueError(f"eps: expected a positive number, got {eps}")


def _check_weight(weight, x):
  if weight.shape != x.shape[-1:]:
    raise ValueError(
      f"weight: expected shape {x.shape[-1:]} (the last axis of x), got "
      f"{weight.shape}"
    )


def l2_norm(x: Float[Array, "*axes K"], eps: float = 1e-6) -> Array:
  """x / sqrt(sum x^2 + eps) over the last axis; a zero vector stays zero."""
  _check_float("x", x)
  _check_eps(eps)
  wide = x.astype(_compute_dtype(x))
  square_sum = jnp.sum(wide * wide, axis=-1, keepdims=True)
  return (wide * lax.rsqrt(square_sum + eps)).astype(x.dtype)


def _rms_norm(x, weight, eps):
  """rms_norm before the cast back to x.dtype."""
  wide = x.astype(_compute_dtype(x))
  mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
  weight = weight.astype(wide.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
  return wide * lax.rsqrt(mean_square + eps) * weight


def rms_norm(
  x: Float[Array, "*axes D"], weight: Float[Array, " D"], eps: float = 1e-5
) -> Array:
  """x / sqrt(mean x^2 + eps) * weight over the last axis."""
  _check_float("x", x)
  _check_weight(weight, x)
  _check_eps(eps)
  return _rms_norm(x, weight, eps).astype(x.dtype)


def gated_rms_norm(
  x: Float[Array, "*axes V"],
  gate: Float[Array, "*axes V"],
  weight: Float[Array, " V"],
  *,
  bias: Float[Array, "..."] | None = None,
  activation: Literal["silu", "sigmoid"] = "silu",
  eps: float = 1e-5,
  implementation: str | None = None,
) -> Array:
  """x / sqrt(mean x^2 + eps) * weight * act(gate + bias) (section 3.5).

  All steps are float32; only the result is rounded.

  Args:
    x: [..., V].
    gate: [..., V], of the shape of x.
    weight: [V].
    bias: Of the shape of gate's last axes, V at least; None means zero.
    activation: "silu" or "sigmoid".
    eps: Added to the mean of squares, > 0.
    implementation: "xla"; "mosaic_gpu", kernels for Hopper that read and write
      every array once, for x [B, T, H, V] of 16 bits; None chooses as gdn2.

  Returns:
    An array like x.

  Raises:
    ValueError: An argument has a wrong shape, dtype or value; it is named.
    NotImplementedError: The named implementation cannot run this call.
  """
  _check_float("x", x)
  if gate.shape != x.shape:
    raise ValueError(
      f"gate: expected the shape of x, {x.shape}, got {gate.shape}"
    )
  _check_weight(weight, x)
  _check_eps(eps)
  if bias is not None and (
    bias.ndim < 1 or bias.shape != gate.shape[gate.ndim - bias.ndim :]
  ):
    raise ValueError(
      f"bias: expected the shape of the last axes of gate, {gate.shape}, got "
      f"{bias.shape}"
    )
  if activation not in ("silu", "sigmoid"):
    raise ValueError(
      f"activation: expected 'silu' or 'sigmoid', got {activation!r}"
    )
  if choice.use_kernel(
    "gated_rms_norm",
    implementation,
    x,
    lambda: _gated_kernels().unsupported_reason(x, gate),
    lambda: _gated_kernels_are_right(x),
  ):
    if bias is None:
      bias = jnp.zeros((), jnp.float32)
    bias = jnp.broadcast_to(bias, x.shape[2:])
    run = _gated_kernels().gated_rms_norm_mosaic_gpu
    return run(x, gate, weight, bias, activation, eps)
  return _gated_rms_norm(x, gate, weight, bias, activation, eps)


def _gated_rms_norm(x, gate, weight, bias, activation="silu", eps=1e-5):
  act = jax.nn.silu if activation == "silu" else jax.nn.sigmoid
  normed = _rms_norm(x, weight, eps)
  gate = gate.astype(normed.dtype)
  if bias is not None:
    gate += bias.astype(gate.dtype).reshape(
      (1,) * (gate.ndim - bias.ndim) + bias.shape
    )
  return (normed * act(gate)).astype(x.dtype)


def _gated_kernels():
  from gdn2_jax.pallas import gated_norm

  return gated_norm


def _gated_kernels_are_right(x):
  def run(x, gate, weight, bias):
    run = _gated_kernels().gated_rms_norm_mosaic_gpu
    return run(x, gate, weight, bias, "silu", 1e-5)

  return choice.is_right_here(
    "mosaic_gpu gated_rms_norm",
    run,
    _gated_rms_norm,
    "gated_norm",
    x,
  )
