"""Causal attention over a sliding window, in memory linear in T.

    o_i = sum_j p_ij v_j,  p_i = softmax_j(scale * q_i . k_j)

over the keys j that query i may see: not later than i, fewer than `window`
tokens back, in the same segment. Scores exist for one block of queries at a
time, forward and backward.
"""

import ctypes.util
import importlib.util
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gdn2_jax.kernels import choice
from gdn2_jax.ops.attention.xla import blockwise_attention
from gdn2_jax.ops.context.borders import check_axis, left_halo, vary

IMPLEMENTATIONS = ("xla", "cudnn", "mosaic_gpu")


def _check_qkv(q, k, v, scale):
  """Refuses shapes and dtypes that do not fit, before any compute."""
  if q.ndim != 4 or not jnp.issubdtype(q.dtype, jnp.floating):
    raise ValueError(
      f"q: expected floating [B, T, HQ, D], got {q.dtype} of shape {q.shape}"
    )
  batch, heads, channels = q.shape[0], q.shape[-2], q.shape[-1]
  if k.ndim != 4 or (k.shape[0], k.shape[3]) != (batch, channels):
    raise ValueError(
      f"k: expected [B, S, HKV, D] with B = {batch}, D = {channels}, got "
      f"{k.shape}"
    )
  if v.shape != k.shape:
    raise ValueError(f"v: expected the shape of k, {k.shape}, got {v.shape}")
  for name, x in (("k", k), ("v", v)):
    if x.dtype != q.dtype:
      raise ValueError(
        f"{name}: expected the dtype of q, {q.dtype}, got {x.dtype}"
      )
  if k.shape[2] < 1 or heads % k.shape[2]:
    raise ValueError(
      f"q: expected a multiple of the {k.shape[2]} heads of k, got {heads} "
      f"heads in shape {q.shape}"
    )
  if scale is not None and not scale > 0:
    raise ValueError(f"scale: expected a positive number, got {scale}")


def _check_options(q, k, window, implementation):
  time, keys = q.shape[1], k.shape[1]
  if time < 1 or keys < time:
    raise ValueError(
      f"k: expected S >= T >= 1 (queries stand at the end of the keys), got "
      f"S = {keys}, T = {time}"
    )
  if window is not None and window < 1:
    raise ValueError(f"window: expected None or at least 1, got {window}")
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(
      f"implementation: expected None or one of {', '.join(IMPLEMENTATIONS)}, "
      f"got {implementation!r}"
    )


def _check_segments(q, k, q_segment_ids, kv_segment_ids):
  if (q_segment_ids is None) != (kv_segment_ids is None):
    absent = "kv" if kv_segment_ids is None else "q"
    raise ValueError(
      f"{absent}_segment_ids: expected together with the other, got None"
    )
  for name, ids, x in (
    ("q_segment_ids", q_segment_ids, q),
    ("kv_segment_ids", kv_segment_ids, k),
  ):
    if ids is not None and (
      ids.shape != x.shape[:2] or not jnp.issubdtype(ids.dtype, jnp.integer)
    ):
      raise ValueError(
        f"{name}: expected integers of shape {x.shape[:2]}, got {ids.dtype} "
        f"of shape {ids.shape}"
      )


def _cudnn_found():
  if ctypes.util.find_library("cudnn"):
    return True
  spec = importlib.util.find_spec("nvidia")
  return spec is not None and (
    importlib.util.find_spec("nvidia.cudnn") is not None
  )


def cudnn_unsupported_reason(q, k, segment_ids=None) -> str | None:
  """Why "cudnn" cannot run this call, None if it can."""
  if jax.default_backend() != "gpu":
    return f"needs a GPU, the backend is {jax.default_backend()}"
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    return f"needs bfloat16 or float16, got {q.dtype}"
  if segment_ids is not None:
    return "has no segment ids"
  if q.shape[1] != k.shape[1]:
    return f"needs S == T, got S = {k.shape[1]}, T = {q.shape[1]}"
  if q.shape[-1] > 128 or q.shape[-1] % 8:
    return f"needs D <= 128 and a multiple of 8, got {q.shape[-1]}"
  capability = getattr(jax.local_devices()[0], "compute_capability", None)
  if capability is None or float(capability) < 8:
    return f"needs compute capability 8.0, got {capability}"
  if not _cudnn_found():
    return "cuDNN is not installed"
  return None


def _attend_in_parts(q, k, v, q_ids, kv_ids, window, scale):
  """Blockwise attention, queries in four parts that read no later key.

  A block's span of keys has a fixed length: the window, or without a window
  all keys of the call, half of which are later than the average query. Parts
  cut that half to an eighth.
  """
  time, context = q.shape[1], k.shape[1] - q.shape[1]
  parts = 4 if window is None and time >= 512 else 1
  ends = [time * (part + 1) // parts for part in range(parts)]
  outs = []
  for first, end in zip([0, *ends], ends, strict=False):
    keys = slice(0, context + end)
    ids = (None, None)
    if q_ids is not None:
      ids = q_ids[:, first:end], kv_ids[:, keys]
    outs.append(
      blockwise_attention(
        q[:, first:end], k[:, keys], v[:, keys], *ids, window, scale
      )
    )
  return outs[0] if parts == 1 else jnp.concatenate(outs, axis=1)


def sliding_window_attention(
  q: Float[Array, "B T HQ D"],
  k: Float[Array, "B S HKV D"],
  v: Float[Array, "B S HKV D"],
  *,
  window: int | None,
  q_segment_ids: Int[Array, "B T"] | None = None,
  kv_segment_ids: Int[Array, "B S"] | None = None,
  scale: float | None = None,
  implementation: Literal["xla", "cudnn", "mosaic_gpu"] | None = None,
  axis_name: str | None = None,
) -> Float[Array, "B T HQ D"]:
  """Causal attention in which a query sees its last `window` keys.

  The queries stand at the end of the keys: query i at key index c + i,
  c = S - T, and the first c keys are context. Query i sees key j if
  j <= c + i, c + i - j < window and both carry the same nonzero segment id.
  A query that sees no key gives exactly 0 and takes and sends no gradient.

  Distances count tokens of the row, so padding (id 0) may stand between
  segments or at the end of a row, and segments of a row need distinct ids.

  Args:
    q: [B, T, HQ, D], HQ a multiple of HKV; query head h reads key head
      h // (HQ // HKV).
    k: [B, S, HKV, D], S >= T.
    v: [B, S, HKV, D].
    window: number of keys a query sees, itself included; None for all.
    q_segment_ids: [B, T] or None.
    kv_segment_ids: [B, S], given if and only if q_segment_ids is.
    scale: multiplies the scores; None for D^-0.5.
    implementation: "xla" takes every call; "cudnn" on a GPU, bfloat16 or
      float16, S == T, no segment ids; "mosaic_gpu", kernels for Hopper,
      bfloat16 or float16, S == T, D 64 or 128, the same ids for queries and
      keys. None takes "cudnn" where it can run, else "mosaic_gpu" where it can
      run and has proved right, else "xla".
    axis_name: Mesh axis that the rows are split over, for a call under
      jax.shard_map: every array is then this device's shard, S == T, and
      segment ids are distinct along the whole row
      (context.borders.runs_and_positions makes them). A window beyond T + 1
      takes a message for each shard that it reaches. None: rows are whole.

  Returns:
    [B, T, HQ, D] in q.dtype; scores and softmax are float32 (float64 for
    float64 inputs).

  Raises:
    ValueError: a shape, dtype or number does not fit.
    NotImplementedError: the named implementation cannot run this call.
  """
  _check_qkv(q, k, v, scale)
  _check_options(q, k, window, implementation)
  _check_segments(q, k, q_segment_ids, kv_segment_ids)
  if axis_name is not None:
    k, v, q_segment_ids, kv_segment_ids = _keys_before(
      k, v, q_segment_ids, kv_segment_ids, window, axis_name, q.shape[1]
    )
  scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
  if implementation in (None, "cudnn"):
    reason = cudnn_unsupported_reason(q, k, q_segment_ids)
    if implementation == "cudnn" and reason:
      raise NotImplementedError(f"sliding_window_attention(cudnn): {reason}")
    if reason is None:
      return jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
      )
  if choice.use_kernel(
    "sliding_window_attention",
    implementation,
    q,
    lambda: _kernel_reason(q, k, q_segment_ids, kv_segment_ids),
    lambda: _kernels_are_right(q),
  ):
    return _run_kernels(q, k, v, q_segment_ids, window, scale)
  return _attend_in_parts(q, k, v, q_segment_ids, kv_segment_ids, window, scale)


def _keys_before(k, v, q_ids, kv_ids, window, axis_name, T):
  """k, v and both ids, with those of the shards before that a window sees."""
  devices = check_axis(axis_name)
  if k.shape[1] != T:
    raise ValueError(f"k: expected S = T = {T} with axis_name, got {k.shape}")
  before = (devices - 1) * T
  if window is not None:
    before = min(window - 1, before)
  if q_ids is None and devices > 1:
    # The first shard has no tokens before it, though it has a halo.
    q_ids = kv_ids = vary(jnp.ones(k.shape[:2], jnp.int32), axis_name)
  if before:
    k, v, kv_ids = (
      jnp.concatenate([left_halo(x, before, axis_name=axis_name), x], axis=1)
      for x in (k, v, kv_ids)
    )
  return k, v, q_ids, kv_ids


def _kernel_reason(q, k, q_ids, kv_ids):
  from gdn2_jax.pallas.attention.api import unsupported_reason

  if q_ids is not kv_ids:
    return "needs the same array of segment ids for queries and keys"
  return unsupported_reason(q, k)


def _run_kernels(q, k, v, segment_ids, window, scale):
  from gdn2_jax.pallas.attention.api import attention_mosaic_gpu

  return attention_mosaic_gpu(q, k, v, segment_ids, window, scale)


def _kernels_are_right(q):
  def xla(q, k, v, ids, window, scale):
    return blockwise_attention(q, k, v, ids, ids, window, scale)

  return choice.is_right_here(
    "mosaic_gpu sliding_window_attention",
    _run_kernels,
    xla,
    "attention",
    q,
  )
