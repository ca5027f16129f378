"""Causal attention over a sliding window, in memory linear in T.

    o_i = sum_j p_ij v_j,  p_i = softmax_j(scale * q_i . k_j)

over the keys j that query i may see: not later than i, fewer than `window`
tokens back, in the same segment. Scores exist for one block of queries at a
time, forward and backward.
"""

import ctypes.util
import functools
import importlib.util
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

# Legend: B batch, T queries, S keys, HK key heads, G query heads of a key
# head (HQ = HK G), D head channels, N blocks, C queries of a block,
# L keys that a block of queries reads.

_MAX_BLOCK = 256


def _check_qkv(q, k, v, scale, rank):
  """Refuses shapes and dtypes that do not fit, before any compute."""
  layout = "[B, T, HQ, D]" if rank == 4 else "[B, HQ, D]"
  if q.ndim != rank or not jnp.issubdtype(q.dtype, jnp.floating):
    raise ValueError(
      f"q: expected floating {layout}, got {q.dtype} of shape {q.shape}"
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


def _check_window(q, k, window):
  time, keys = q.shape[1], k.shape[1]
  if time < 1 or keys < time:
    raise ValueError(
      f"k: expected S >= T >= 1 (queries stand at the end of the keys), got "
      f"S = {keys}, T = {time}"
    )
  if window is not None and window < 1:
    raise ValueError(f"window: expected None or at least 1, got {window}")


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


def _block_size(time, window):
  """A power of two, at most the window and no larger than T needs."""
  block = 1
  while block < min(time, window, _MAX_BLOCK):
    block *= 2
  return block


def _pad_time(x, length):
  widths = [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
  return jnp.pad(x, widths)


def _split_blocks(x, block, key_heads):
  """[B, N C, HQ, ...] to [N, B, C, HK, G, ...]."""
  batch, time, heads = x.shape[:3]
  x = x.reshape(
    (batch, time // block, block, key_heads, heads // key_heads, *x.shape[3:])
  )
  return jnp.moveaxis(x, 1, 0)


def _join_blocks(x):
  """[N, B, C, HK, G, ...] to [B, N C, HQ, ...]."""
  x = jnp.moveaxis(x, 0, 1)
  batch, blocks, block, key_heads, group = x.shape[:5]
  return x.reshape((batch, blocks * block, key_heads * group, *x.shape[5:]))


class _Plan:
  """The static geometry of one call: which keys each block reads."""

  def __init__(self, time, keys, window, block):
    window = keys if window is None else min(window, keys)
    self.window = window
    self.block = block or _block_size(time, window)
    self.blocks = -(-time // self.block)
    self.time = self.blocks * self.block  # queries, padded at the end
    self.context = keys - time
    self.keys = self.context + self.time  # keys, padded at the end
    self.span = min(self.keys, self.block + window - 1)

  def start(self, index):
    """First key that block `index` reads."""
    end = self.context + (index + 1) * self.block
    return jnp.maximum(end - self.span, 0)

  def mask(self, index, q_ids, kv_ids):
    """[B or 1, 1, 1, C, L]: may the query read the key."""
    row = jnp.arange(self.block, dtype=jnp.int32).reshape((-1, 1))
    column = jnp.arange(self.span, dtype=jnp.int32).reshape((1, -1))
    row = row + self.context + index * self.block
    column = column + self.start(index)
    allowed = (column <= row) & (row - column < self.window)
    allowed = allowed[None]
    if q_ids is not None:
      q_ids, kv_ids = q_ids[:, :, None], kv_ids[:, None, :]
      allowed = allowed & (q_ids == kv_ids) & (q_ids != 0)
    return allowed[:, None, None]

  def take(self, x, index):
    """The span of keys that block `index` reads, of [B, S, ...]."""
    return lax.dynamic_slice_in_dim(x, self.start(index), self.span, axis=1)

  def add(self, total, x, index):
    """Adds to the span of block `index`, in place inside a loop."""
    x = self.take(total, index) + x
    return lax.dynamic_update_slice_in_dim(total, x, self.start(index), axis=1)


def _blocks(plan, q, k, v, q_ids, kv_ids):
  """Pads to whole blocks; per-block queries and ids, all keys and ids."""
  q_blocks = _split_blocks(_pad_time(q, plan.time), plan.block, k.shape[2])
  k, v = _pad_time(k, plan.keys), _pad_time(v, plan.keys)
  if q_ids is None:
    return q_blocks, k, v, None, None
  id_blocks = _pad_time(q_ids, plan.time).reshape((-1, plan.blocks, plan.block))
  kv_ids = _pad_time(kv_ids, plan.keys)
  return q_blocks, k, v, jnp.moveaxis(id_blocks, 1, 0), kv_ids


def _scores(plan, index, q, q_ids, k, kv_ids, scale):
  """Masked scores [B, HK, G, C, L], -inf where the query may not look."""
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  scores = jnp.einsum("bchgd,blhd->bhgcl", q, k, preferred_element_type=dtype)
  kv_ids = None if q_ids is None else plan.take(kv_ids, index)
  mask = plan.mask(index, q_ids, kv_ids)
  return jnp.where(mask, scores * scale, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attention(q, k, v, q_ids, kv_ids, window, scale, block):
  return _forward(q, k, v, q_ids, kv_ids, window, scale, block)[0]


def _forward(q, k, v, q_ids, kv_ids, window, scale, block):
  plan = _Plan(q.shape[1], k.shape[1], window, block)
  q_blocks, k_all, v_all, id_blocks, kv_all = _blocks(
    plan, q, k, v, q_ids, kv_ids
  )

  def body(_, xs):
    index, q_block, ids = xs
    k_span, v_span = plan.take(k_all, index), plan.take(v_all, index)
    scores = _scores(plan, index, q_block, ids, k_span, kv_all, scale)
    top = jnp.max(scores, axis=-1, keepdims=True)
    top = jnp.where(top == -jnp.inf, 0, top)  # a query that sees no key
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    total = jnp.where(total == 0, 1, total)
    weights = (weights / total).astype(v.dtype)
    out = jnp.einsum(
      "bhgcl,blhd->bchgd", weights, v_span, preferred_element_type=top.dtype
    )
    lse = jnp.moveaxis((top + jnp.log(total))[..., 0], -1, 1)
    return None, (out.astype(q.dtype), lse)

  xs = jnp.arange(plan.blocks, dtype=jnp.int32), q_blocks, id_blocks
  _, (out, lse) = lax.scan(body, None, xs)
  out = _join_blocks(out)[:, : q.shape[1]]
  return out, (q, k, v, q_ids, kv_ids, out, lse)


def _backward(window, scale, block, residuals, d_out):
  q, k, v, q_ids, kv_ids, out, lse = residuals
  plan = _Plan(q.shape[1], k.shape[1], window, block)
  q_blocks, k_all, v_all, id_blocks, kv_all = _blocks(
    plan, q, k, v, q_ids, kv_ids
  )
  key_heads, dtype = k.shape[2], lse.dtype
  # sum_j p_ij dp_ij, without the scores: it is o_i . do_i
  delta = jnp.sum(out.astype(dtype) * d_out.astype(dtype), axis=-1)

  def body(carry, xs):
    index, q_block, ids, lse_block, d_block, delta_block = xs
    k_span, v_span = plan.take(k_all, index), plan.take(v_all, index)
    scores = _scores(plan, index, q_block, ids, k_span, kv_all, scale)
    weights = jnp.exp(scores - jnp.moveaxis(lse_block, 1, -1)[..., None])
    product = functools.partial(jnp.einsum, preferred_element_type=dtype)
    d_weights = product("bchgd,blhd->bhgcl", d_block, v_span)
    d_weights = d_weights - jnp.moveaxis(delta_block, 1, -1)[..., None]
    d_scores = (weights * d_weights * scale).astype(q.dtype)
    d_v = product("bhgcl,bchgd->blhd", weights.astype(q.dtype), d_block)
    d_k = product("bhgcl,bchgd->blhd", d_scores, q_block)
    d_q = product("bhgcl,blhd->bchgd", d_scores, k_span).astype(q.dtype)
    d_k_all, d_v_all = carry
    return (plan.add(d_k_all, d_k, index), plan.add(d_v_all, d_v, index)), d_q

  xs = (
    jnp.arange(plan.blocks, dtype=jnp.int32),
    q_blocks,
    id_blocks,
    lse,
    _split_blocks(_pad_time(d_out, plan.time), plan.block, key_heads),
    _split_blocks(_pad_time(delta, plan.time), plan.block, key_heads),
  )
  zeros = jnp.zeros(k_all.shape, dtype)
  (d_k, d_v), d_q = lax.scan(body, (zeros, zeros), xs)
  d_q = _join_blocks(d_q)[:, : q.shape[1]]
  keys = k.shape[1]
  d_k, d_v = d_k[:, :keys].astype(k.dtype), d_v[:, :keys].astype(v.dtype)
  return d_q, d_k, d_v, None, None


_attention.defvjp(_forward, _backward)


def _cudnn_found():
  if ctypes.util.find_library("cudnn"):
    return True
  spec = importlib.util.find_spec("nvidia")
  return spec is not None and (
    importlib.util.find_spec("nvidia.cudnn") is not None
  )


def cudnn_unsupported_reason(q, k, segment_ids=None) -> str | None:
  """Why the "cudnn" implementation cannot run this call, None if it can.

  Args:
    q: [B, T, HQ, D] queries.
    k: [B, S, HKV, D] keys.
    segment_ids: segment ids of the call or None.

  Returns:
    One sentence, or None.
  """
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


def sliding_window_attention(
  q: Float[Array, "B T HQ D"],
  k: Float[Array, "B S HKV D"],
  v: Float[Array, "B S HKV D"],
  *,
  window: int | None,
  q_segment_ids: Int[Array, "B T"] | None = None,
  kv_segment_ids: Int[Array, "B S"] | None = None,
  scale: float | None = None,
  implementation: Literal["xla", "cudnn"] | None = None,
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
    implementation: "xla" runs anywhere; "cudnn" on a GPU, bfloat16 or float16,
      S == T, no segment ids; None takes "cudnn" where it can run.

  Returns:
    [B, T, HQ, D] in q.dtype; scores and softmax are float32 (float64 for
    float64 inputs).

  Raises:
    ValueError: a shape, dtype or number does not fit.
    NotImplementedError: the named implementation cannot run this call.
  """
  _check_qkv(q, k, v, scale, rank=4)
  _check_window(q, k, window)
  _check_segments(q, k, q_segment_ids, kv_segment_ids)
  if implementation not in (None, "xla", "cudnn"):
    raise ValueError(
      f"implementation: expected 'xla', 'cudnn' or None, got {implementation!r}"
    )
  scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
  if implementation != "xla":
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
  return _attention(q, k, v, q_segment_ids, kv_segment_ids, window, scale, None)


def attention_step(
  q: Float[Array, "B HQ D"],
  k: Float[Array, "B S HKV D"],
  v: Float[Array, "B S HKV D"],
  valid: Bool[Array, "B S"],
  *,
  scale: float | None = None,
) -> Float[Array, "B HQ D"]:
  """One query per row over a ring of keys, in any order.

  Args:
    q: [B, HQ, D], HQ a multiple of HKV.
    k: [B, S, HKV, D].
    v: [B, S, HKV, D].
    valid: [B, S], the keys the query may see; with none, the row gives 0.
    scale: multiplies the scores; None for D^-0.5.

  Returns:
    [B, HQ, D] in q.dtype.

  Raises:
    ValueError: a shape or dtype does not fit.
  """
  _check_qkv(q, k, v, scale, rank=3)
  if valid.shape != k.shape[:2] or valid.dtype != np.bool_:
    raise ValueError(
      f"valid: expected booleans of shape {k.shape[:2]}, got {valid.dtype} of "
      f"shape {valid.shape}"
    )
  scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
  batch, heads, channels = q.shape
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  q = q.reshape((batch, k.shape[2], heads // k.shape[2], channels))
  scores = jnp.einsum("bhgd,bshd->bhgs", q, k, preferred_element_type=dtype)
  valid = valid[:, None, None, :]
  scores = jnp.where(valid, scores * scale, -jnp.inf)
  top = jnp.max(scores, axis=-1, keepdims=True)
  top = jnp.where(top == -jnp.inf, 0, top)
  weights = jnp.exp(scores - lax.stop_gradient(top))
  total = jnp.sum(weights, axis=-1, keepdims=True)
  weights = (weights / jnp.where(total == 0, 1, total)).astype(v.dtype)
  out = jnp.einsum("bhgs,bshd->bhgd", weights, v, preferred_element_type=dtype)
  return out.reshape((batch, heads, channels)).astype(q.dtype)
