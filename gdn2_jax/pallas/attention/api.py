"""Differentiable function of the windowed attention kernels for Hopper."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gdn2_jax.kernels import target
from gdn2_jax.pallas.attention.backward import attention_grad
from gdn2_jax.pallas.attention.forward import attention
from gdn2_jax.pallas.partition import over_batch_and_heads

BLOCK = 64
HEAD_DIMS = (64, 128)
_DTYPES = ("bfloat16", "float16")
_NOWHERE = 1 << 30  # above any key


def unsupported_reason(q: Any, k: Any) -> str | None:
  """Reason that the kernels cannot run a call with q and k, or None."""
  if q.shape[1] != k.shape[1]:
    return f"needs S == T, got S = {k.shape[1]}, T = {q.shape[1]}"
  if q.shape[1] < BLOCK:
    return f"T = {q.shape[1]}, expected at least {BLOCK} tokens"
  if q.shape[-1] not in HEAD_DIMS:
    return f"D = {q.shape[-1]}, expected one of {HEAD_DIMS}"
  if jnp.dtype(q.dtype).name not in _DTYPES:
    return f"dtype {jnp.dtype(q.dtype).name}, expected {' or '.join(_DTYPES)}"
  return None


def attention_mosaic_gpu(
  q: Float[Array, "B T HQ D"],
  k: Float[Array, "B T HKV D"],
  v: Float[Array, "B T HKV D"],
  segment_ids: Int[Array, "B T"] | None,
  window: int | None,
  scale: float,
) -> Float[Array, "B T HQ D"]:
  """Computes ops.attention.sliding_window_attention for S == T.

  All arrays have one dtype; see unsupported_reason. Each id of segment_ids is
  one run of tokens, and 0 is padding.
  """
  (B, T, _, D), H = q.shape, k.shape[2]
  low = _first_keys(segment_ids, B, T, window)
  if segment_ids is not None:
    # Padding may hold NaN, and 0 * NaN is NaN, here and in the gradient. XLA
    # fuses these masks with other operations.
    is_token = (segment_ids != 0)[:, :, None, None]
    q, k, v = (jnp.where(is_token, x, 0) for x in (q, k, v))
  more = -T % BLOCK

  def whole(x, fill=0):
    widths = ((0, 0), (0, more), *(x.ndim - 2) * ((0, 0),))
    return jnp.pad(x, widths, constant_values=fill) if more else x

  q_heads = whole(q).reshape(B, T + more, H, -1, D)
  o = _differentiable(q_heads, whole(k), whole(v), whole(low, _NOWHERE), scale)
  o = o[:, :T].reshape(q.shape)
  return o if segment_ids is None else jnp.where(is_token, o, 0)


def _first_keys(segment_ids, B, T, window):
  """Index of the first key that each query sees, [B, T] int32."""
  t = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
  low = jnp.zeros_like(t)
  if segment_ids is not None:
    begins = segment_ids[:, 1:] != segment_ids[:, :-1]
    begins = jnp.pad(begins, ((0, 0), (1, 0)), constant_values=True)
    low = jax.lax.cummax(jnp.where(begins, t, 0), axis=1)
  if window is not None:
    low = jnp.maximum(low, t - (window - 1))
  if segment_ids is not None:
    low = jnp.where(segment_ids != 0, low, _NOWHERE)
  return low


def _forward(scale, *, save):
  results = ("b.h", "b.h", "bh") if save else ("b.h",)
  layouts = ("b.h", "b.h", "b.h", "b")
  return over_batch_and_heads(
    attention, layouts, results, scale=scale, save=save
  )


def _attend(q, k, v, low, scale):
  (o,) = _forward(scale, save=False)(q, k, v, low)
  return o


def _attend_fwd(q, k, v, low, scale):
  o, rest, lse = _forward(scale, save=True)(q, k, v, low)
  return o, (q, k, v, low, o, rest, lse)


def _attend_bwd(scale, residuals, do):
  q, k, v, low, o, rest, lse = residuals
  wide = (x.astype(jnp.float32) for x in (o, rest, do))
  delta = _row_sums(*wide)
  run = over_batch_and_heads(
    attention_grad,
    ("b.h", "b.h", "b.h", "b", "b.h", "bh", "bh"),
    3 * ("b.h",),
    scale=scale,
  )
  return *run(q, k, v, low, do.astype(q.dtype), lse, delta), None


def _row_sums(o, rest, do):
  """Sums of do * o over channels, [B, H, G, T]."""
  return jnp.moveaxis(jnp.sum((o + rest) * do, axis=-1), 1, 3)


_differentiable = target.differentiable(
  _attend, _attend_fwd, _attend_bwd, static=4
)
