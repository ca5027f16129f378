"""Blockwise causal attention in XLA, with a hand-written backward pass.

A scan over blocks of queries; every block reads the span of keys that its
queries see. With weights P = softmax(scale Q K^T) of a block,

    O = P V
    dP = dO V^T,  dS = scale * P * (dP - rowsum(P * dP))
    dQ = dS K,    dK += dS^T Q,    dV += P^T dO

The backward pass recomputes P from the saved logsumexp, so the scores of one
block are the largest temporary of either pass.

Legend: B batch, T queries, S keys, HK key heads, G query heads of a key head
(HQ = HK G), D head channels, N blocks, C queries of a block, L keys of a span.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

# Queries per block. Each query computes block + window - 1 scores. On a CPU 128
# was within 15% of the best size for windows from 256 up; 256 took 1.4 to 2
# times as long. Not measured on a GPU.
_MAX_BLOCK = 128


class _Plan:
  """Static geometry of a call: blocks of queries and their spans of keys."""

  def __init__(self, q, k, window, block):
    time, keys = q.shape[1], k.shape[1]
    self.window = keys if window is None else min(window, keys)
    self.block = block or _block_size(time, self.window)
    self.blocks = -(-time // self.block)
    self.time = self.blocks * self.block  # queries, padded at the end
    self.context = keys - time
    self.keys = self.context + self.time  # keys, padded at the end
    self.span = min(self.keys, self.block + self.window - 1)

  def start(self, index):
    """Index of the first key that block `index` reads."""
    end = self.context + (index + 1) * self.block
    return jnp.maximum(end - self.span, 0)

  def mask(self, index, q_ids, kv_ids):
    """Mask [B or 1, 1, 1, C, L], True where the query sees the key."""
    row = jnp.arange(self.block, dtype=jnp.int32).reshape((-1, 1))
    column = jnp.arange(self.span, dtype=jnp.int32).reshape((1, -1))
    distance = self.context + index * self.block - self.start(index)
    distance = distance + row - column
    allowed = ((distance >= 0) & (distance < self.window))[None]
    if q_ids is not None:
      q_ids, kv_ids = q_ids[:, :, None], kv_ids[:, None, :]
      allowed = allowed & (q_ids == kv_ids) & (q_ids != 0)
    return allowed[:, None, None]

  def take(self, x, index):
    """Slices the span of block `index` from [B, S, ...]."""
    return lax.dynamic_slice_in_dim(x, self.start(index), self.span, axis=1)

  def add(self, total, x, index):
    """Adds x to the span of block `index`, in place inside a loop."""
    x = self.take(total, index) + x
    return lax.dynamic_update_slice_in_dim(total, x, self.start(index), axis=1)

  def blocks_first(self, x, key_heads=None):
    """[B, T, ...] to [N, B, C, ...]; key_heads splits HQ into HK, G."""
    x = _pad_time(x, self.time)
    tail = x.shape[2:]
    if key_heads is not None:
      tail = (key_heads, tail[0] // key_heads, *tail[1:])
    x = x.reshape((x.shape[0], self.blocks, self.block, *tail))
    return jnp.moveaxis(x, 1, 0)


def _block_size(time, window):
  """Queries per block: a power of two, no more than T or the window needs."""
  block = 1
  while block < min(time, window, _MAX_BLOCK):
    block *= 2
  return block


def _pad_time(x, length):
  widths = [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
  return jnp.pad(x, widths)


def _join_blocks(x_NBCHGD, time):
  """[N, B, C, HK, G, D] to [B, T, HQ, D]."""
  x = jnp.moveaxis(x_NBCHGD, 0, 1)
  batch, blocks, block, key_heads, group, channels = x.shape
  x = x.reshape((batch, blocks * block, key_heads * group, channels))
  return x[:, :time]


def _layout(plan, q, k, v, q_ids, kv_ids):
  """Queries and their ids in blocks; keys, values and their ids padded."""
  key_heads = k.shape[2]
  if q_ids is not None:
    # Padding may hold NaN or inf, and 0 * NaN is NaN: mask the inputs, too.
    q = jnp.where((q_ids != 0)[:, :, None, None], q, 0)
    k = jnp.where((kv_ids != 0)[:, :, None, None], k, 0)
    v = jnp.where((kv_ids != 0)[:, :, None, None], v, 0)
    q_ids = plan.blocks_first(q_ids)
    kv_ids = _pad_time(kv_ids, plan.keys)
  q_NBCHGD = plan.blocks_first(q, key_heads)
  return (
    q_NBCHGD,
    _pad_time(k, plan.keys),
    _pad_time(v, plan.keys),
    q_ids,
    kv_ids,
  )


def product(equation, x, y):
  """Einsum with float32 accumulation that never rounds float32 inputs."""
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  precision = lax.Precision.HIGHEST if x.dtype == dtype else None
  return jnp.einsum(
    equation, x, y, precision=precision, preferred_element_type=dtype
  )


def _scores(plan, index, q_BCHGD, k_BLHD, q_ids, kv_ids, scale):
  """Scores [B, HK, G, C, L], -inf where the query does not see the key."""
  scores = product("bchgd,blhd->bhgcl", q_BCHGD, k_BLHD) * scale
  kv_ids = None if q_ids is None else plan.take(kv_ids, index)
  return jnp.where(plan.mask(index, q_ids, kv_ids), scores, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def blockwise_attention(q, k, v, q_ids, kv_ids, window, scale, block=None):
  """sliding_window_attention by XLA, with `block` queries at a time."""
  return _forward(q, k, v, q_ids, kv_ids, window, scale, block)[0]


def _forward(q, k, v, q_ids, kv_ids, window, scale, block):
  plan = _Plan(q, k, window, block)
  q_blocks, k_all, v_all, id_blocks, kv_all = _layout(
    plan, q, k, v, q_ids, kv_ids
  )

  def body(_, xs):
    # The masks are the same in all layers. Without the barrier JAX computes the
    # masks of all blocks before a scan over layers, and keeps them in memory.
    index, q_BCHGD, ids = lax.optimization_barrier(xs)
    k_BLHD, v_BLHD = plan.take(k_all, index), plan.take(v_all, index)
    scores = _scores(plan, index, q_BCHGD, k_BLHD, ids, kv_all, scale)
    top = jnp.max(scores, axis=-1, keepdims=True)
    top = jnp.where(top == -jnp.inf, 0, top)  # a query that sees no key
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    total = jnp.where(total == 0, 1, total)
    weights = (weights / total).astype(v.dtype)
    out_BCHGD = product("bhgcl,blhd->bchgd", weights, v_BLHD)
    return None, (out_BCHGD.astype(q.dtype), top + jnp.log(total))

  xs = jnp.arange(plan.blocks, dtype=jnp.int32), q_blocks, id_blocks
  _, (out, lse_NBHGC1) = lax.scan(body, None, xs)
  residuals = q, k, v, q_ids, kv_ids, lse_NBHGC1
  return _join_blocks(out, q.shape[1]), residuals


def _backward(window, scale, block, residuals, d_out):
  q, k, v, q_ids, kv_ids, lse_NBHGC1 = residuals
  plan = _Plan(q, k, window, block)
  q_blocks, k_all, v_all, id_blocks, kv_all = _layout(
    plan, q, k, v, q_ids, kv_ids
  )

  def body(carry, xs):
    index, q_BCHGD, ids, lse_BHGC1, d_out_BCHGD = xs
    k_BLHD, v_BLHD = plan.take(k_all, index), plan.take(v_all, index)
    scores = _scores(plan, index, q_BCHGD, k_BLHD, ids, kv_all, scale)
    weights = jnp.exp(scores - lse_BHGC1)
    d_weights = product("bchgd,blhd->bhgcl", d_out_BCHGD, v_BLHD)
    # Not rowsum(dO * O): with peaked weights, a saved O that was rounded to
    # bfloat16 makes errors in dQ and dK four times those of rounding them.
    inner_BHGC1 = jnp.sum(weights * d_weights, axis=-1, keepdims=True)
    d_scores = weights * (d_weights - inner_BHGC1) * scale
    d_scores, weights = d_scores.astype(q.dtype), weights.astype(q.dtype)
    d_v_BLHD = product("bhgcl,bchgd->blhd", weights, d_out_BCHGD)
    d_k_BLHD = product("bhgcl,bchgd->blhd", d_scores, q_BCHGD)
    d_q_BCHGD = product("bhgcl,blhd->bchgd", d_scores, k_BLHD)
    d_k, d_v = carry
    carry = plan.add(d_k, d_k_BLHD, index), plan.add(d_v, d_v_BLHD, index)
    return carry, d_q_BCHGD.astype(q.dtype)

  xs = (
    jnp.arange(plan.blocks, dtype=jnp.int32),
    q_blocks,
    id_blocks,
    lse_NBHGC1,
    plan.blocks_first(d_out, k.shape[2]),
  )
  # zeros_like: under shard_map the carry must vary over its updates' axes.
  zeros = jnp.zeros_like(k_all, lse_NBHGC1.dtype)
  (d_k, d_v), d_q = lax.scan(body, (zeros, zeros), xs)
  d_q = _join_blocks(d_q, q.shape[1])
  keys = k.shape[1]
  return (
    d_q,
    d_k[:, :keys].astype(k.dtype),
    d_v[:, :keys].astype(v.dtype),
    None,
    None,
  )


blockwise_attention.defvjp(_forward, _backward)


def attention_and_logsumexp(q, k, v, q_ids, kv_ids, window, scale):
  """Attention, and log sum_j exp(s_j) [B, T, HQ]; no reverse-mode gradient.

  Both are 0 for a query that sees no key.
  """
  out, residuals = _forward(q, k, v, q_ids, kv_ids, window, scale, None)
  lse_NBCHG1 = jnp.moveaxis(residuals[-1], 4, 2)
  return out, _join_blocks(lse_NBCHG1, q.shape[1])[..., 0]
