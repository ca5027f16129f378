"""Causal attention over a sliding window, with memory linear in T.

    o_i = sum_j p_ij v_j,  p_i = softmax_j(scale * q_i . k_j)

over the keys j that query i sees: not later than i, fewer than `window` tokens
before it, in the same segment. Only one block of queries has its scores in
memory at a time, forward and backward.
"""

import ctypes.util
import importlib.util
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gdn2_jax.kernels import choice
from gdn2_jax.ops.attention.xla import blockwise_attention
from gdn2_jax.ops.checks import check_floating, check_integers
from gdn2_jax.ops.context.borders import check_axis, left_halo, vary

IMPLEMENTATIONS = ("xla", "cudnn", "mosaic_gpu")


def _check_qkv(q, k, v, scale):
  """Raises ValueError for wrong shapes and dtypes."""
  check_floating("q", q, "[B, T, HQ, D]")
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
      f"k: expected S >= T >= 1 (queries are the last T tokens), got "
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
    absent, given = ("kv", "q") if kv_segment_ids is None else ("q", "kv")
    raise ValueError(
      f"{absent}_segment_ids: expected an array like {given}_segment_ids, got "
      "None"
    )
  if q_segment_ids is not None:
    check_integers("q_segment_ids", q_segment_ids, "[B, T]", q.shape[:2])
    check_integers("kv_segment_ids", kv_segment_ids, "[B, S]", k.shape[:2])


def _cudnn_found():
  if ctypes.util.find_library("cudnn"):
    return True
  spec = importlib.util.find_spec("nvidia")
  return spec is not None and (
    importlib.util.find_spec("nvidia.cudnn") is not None
  )


def cudnn_unsupported_reason(q, k, segment_ids=None) -> str | None:
  """Reason that "cudnn" cannot run a call, or None if it can."""
  if jax.default_backend() != "gpu":
    return f"needs a GPU, the backend is {jax.default_backend()}"
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    return f"needs bfloat16 or float16, got {q.dtype}"
  if segment_ids is not None:
    return "does not support segment ids"
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
  """Blockwise attention, with the queries in four parts if there is no window.

  Every block of queries reads a span of keys of fixed length: the window, or
  without one all keys of the call, on average half of them later than the
  query. A part reads no key after its last query, so only an eighth is wasted.
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

  The queries are the last T of the S tokens: query i has key index c + i with
  c = S - T. Query i sees key j if j <= c + i, c + i - j < window, and both
  have the same nonzero segment id. The output of a query that sees no key is
  exactly 0, and so are its gradients.

  Distances count tokens of the row. Padding (id 0) is therefore allowed only
  between segments and at the end of a row, and the segments of a row need
  distinct ids.

  Args:
    q: Queries [B, T, HQ, D], HQ a multiple of HKV; query head h reads key head
      h // (HQ // HKV).
    k: Keys [B, S, HKV, D], S >= T.
    v: Values [B, S, HKV, D].
    window: Number of keys that a query sees, its own included; None for all.
    q_segment_ids: [B, T] integers, or None.
    kv_segment_ids: [B, S] integers; required if q_segment_ids is given.
    scale: Factor on the scores; None means D^-0.5.
    implementation: "xla" supports every call; "cudnn" needs a GPU, bfloat16 or
      float16, S == T and no segment ids; "mosaic_gpu", kernels for Hopper,
      needs bfloat16 or float16, S == T, D 64 or 128 and the same ids for
      queries and keys. None takes "cudnn" if it supports the call, else
      "mosaic_gpu" if it does and passed its self-check, else "xla".
    axis_name: Mesh axis that the tokens are split over, for a call under
      jax.shard_map. Every array is then this device's shard, S == T, and
      segment ids are distinct along the whole row, as made by
      context.borders.runs_and_positions. A window beyond T + 1 needs one
      message per shard that it reaches. None: the rows are on one device.

  Returns:
    [B, T, HQ, D] in q.dtype; scores and softmax are float32 (float64 for
    float64 inputs).

  Raises:
    ValueError: An argument has a wrong shape, dtype or value; it is named.
    NotImplementedError: The named implementation cannot run this call.
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
  """Prepends the keys, values and ids of earlier shards within the window."""
  devices = check_axis(axis_name)
  if k.shape[1] != T:
    raise ValueError(f"k: expected S = T = {T} with axis_name, got {k.shape}")
  before = (devices - 1) * T
  if window is not None:
    before = min(window - 1, before)
  if q_ids is None and devices > 1:
    # Ids mark the halo of the first shard, which no token fills, as padding.
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
