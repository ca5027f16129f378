"""Causal attention of new tokens to a key-value cache and to each other.

The caches of all layers are one array; a layer reads its part block by block
without a copy, and stores its new keys and values in place. With scores s_j of
the keys of a block, the running sums of a query are, starting from m = -inf,

    m' = max(m, max_j s_j),  r = exp(m - m')
    l' = r l + sum_j exp(s_j - m'),  a' = r a + sum_j exp(s_j - m') v_j

and its output is a / l.

Legend: B batch, T new tokens, N layers, S slots of the cache, HK key heads,
G query heads of a key head (HQ = HK G), D head channels, L keys of a block.
"""

import functools

import jax.numpy as jnp
from jax import export, lax
from jaxtyping import Array, Float, Int

from gdn2_jax.kernels.target import backend
from gdn2_jax.ops.attention.xla import attention_and_logsumexp, product

# Elements of a block of keys, and of its scores. On a CPU, as measured: a block
# is copied once, which is cheap while the copy fits the second-level cache, and
# larger blocks read more empty slots. On a GPU, not measured: the loop waits
# for the host after each block, so a block should take longer than that.
_CPU_BLOCK, _CPU_SCORES = 1 << 18, 1 << 19
_GPU_BLOCK, _GPU_SCORES = 1 << 26, 1 << 27
_SMALLEST_BLOCK = 128


def cached_attention(
  q: Float[Array, "B T HQ D"],
  k: Float[Array, "B T HKV D"],
  v: Float[Array, "B T HKV D"],
  k_cache: Float[Array, "N B HKV S D"],
  v_cache: Float[Array, "N B HKV S D"],
  *,
  layer: Int[Array, ""] | int,
  held: Int[Array, "B S"],
  positions: Int[Array, "B T"],
  slots: Int[Array, "B T"],
  window: int | None,
  segment_ids: Int[Array, "B T"] | None = None,
  scale: float | None = None,
  block: int | None = None,
) -> tuple[
  Float[Array, "B T HQ D"],
  Float[Array, "N B HKV S D"],
  Float[Array, "N B HKV S D"],
]:
  """Attends to the cache and to the new tokens, then stores the new tokens.

  Queries of the first segment see the cached keys. Queries of every segment see
  the new keys of their segment up to their own. No query sees a key `window` or
  more positions before it. Time is proportional to the last slot in use in any
  row, not to S. No reverse-mode gradient: training has no cache.

  Args:
    q: Rotated queries [B, T, HQ, D]; head h reads key head h // (HQ // HKV).
    k: Rotated keys [B, T, HKV, D].
    v: Values [B, T, HKV, D].
    k_cache: Keys of all layers [N, B, HKV, S, D], finite in every slot.
    v_cache: Values of all layers [N, B, HKV, S, D].
    layer: Index of the layer, below N.
    held: Position of the token in each slot before the call [B, S], -1 if the
      slot is empty.
    positions: Positions of the new tokens [B, T].
    slots: Slot for each new key [B, T], distinct within a row; a token whose
      slot is S or above is not stored.
    window: Number of keys that a query sees, its own included; None for all.
    segment_ids: [B, T], 1 for the first segment, distinct ids for later ones,
      0 for padding, whose output is 0; None for one segment.
    scale: Factor on the scores; None means D^-0.5.
    block: Slots read at a time; None chooses by device.

  Returns:
    o [B, T, HQ, D] in q.dtype, and both caches.
  """
  T, D, S = q.shape[1], q.shape[3], k_cache.shape[3]
  scale = D**-0.5 if scale is None else float(scale)
  block = min(S, block or _block_size(q, k))
  seen = _see_the_new(q, k, v, segment_ids, window, scale)
  q_BHGTD = _heads_first(q, k.shape[2])
  in_first = jnp.ones((1, T), bool) if segment_ids is None else segment_ids == 1

  def see(index, seen):
    start = jnp.minimum(index * block, S - block)  # the last may overlap
    slot = start + jnp.arange(block, dtype=jnp.int32)
    at = lax.dynamic_slice_in_dim(held, start, block, axis=1)
    at = jnp.where((slot >= index * block)[None], at, -1)[:, None]
    mask_BTL = in_first[:, :, None] & (at >= 0)
    if window is not None:
      mask_BTL &= at > positions[:, :, None] - window
    take = functools.partial(_take, layer=layer, start=start, size=block)
    k_BHLD, v_BHLD = take(k_cache), take(v_cache)
    scores = _scores(q_BHGTD, k_BHLD) * scale
    scores = jnp.where(mask_BTL[:, None, None], scores, -jnp.inf)
    return _add(seen, scores, v_BHLD)

  if block == S:
    seen = see(0, seen)
  else:
    used = jnp.where(held >= 0, jnp.arange(1, S + 1, dtype=jnp.int32)[None], 0)
    blocks = (jnp.max(used) + block - 1) // block
    seen = lax.fori_loop(0, blocks, see, seen)
  # Order the writes after the reads: otherwise XLA copies the caches.
  k_cache, v_cache, seen = lax.optimization_barrier((k_cache, v_cache, seen))
  _, total, out = seen
  o = _tokens_first(out / total[..., None]).astype(q.dtype)
  if segment_ids is not None:
    o = jnp.where((segment_ids != 0)[:, :, None, None], o, 0)
  rows = jnp.arange(q.shape[0])[:, None]

  def store(cache, x):
    x = x.astype(cache.dtype)
    return cache.at[layer, rows, :, slots].set(
      x, mode="drop", unique_indices=True
    )

  return o, store(k_cache, k), store(v_cache, v)


def _block_size(q, k):
  """Keys per block, a power of two."""
  B, T, heads, D = q.shape
  if export.is_symbolic_dim(B):
    B = 1  # a program exported for any batch size is tuned for one row
  on_cpu = backend() == "cpu"
  elements = _CPU_BLOCK if on_cpu else _GPU_BLOCK
  scores = _CPU_SCORES if on_cpu else _GPU_SCORES
  most = min(elements // (B * k.shape[2] * D), scores // (B * heads * T))
  return max(_SMALLEST_BLOCK, 1 << max(most, 1).bit_length() - 1)


def _heads_first(x, key_heads):
  """[B, T, HQ, D] to [B, HK, G, T, D]."""
  B, T, heads, D = x.shape
  x = x.reshape(B, T, key_heads, heads // key_heads, D)
  return jnp.moveaxis(x, 1, 3)


def _tokens_first(x_BHGTD):
  """[B, HK, G, T, D] to [B, T, HQ, D]."""
  x = jnp.moveaxis(x_BHGTD, 3, 1)
  return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _see_the_new(q, k, v, segment_ids, window, scale):
  """Running sums m, l [B, HK, G, T], a [B, HK, G, T, D] over the new tokens."""
  key_heads = k.shape[2]
  if q.shape[1] == 1:
    q_BHGTD, k_BHGTD = _heads_first(q, key_heads), _heads_first(k, key_heads)
    top = (product("bhgtd,bhftd->bhgt", q_BHGTD, k_BHGTD)) * scale
    a = jnp.broadcast_to(_heads_first(v, key_heads), q_BHGTD.shape)
  else:
    o, top = attention_and_logsumexp(
      q, k, v, segment_ids, segment_ids, window, scale
    )
    a = _heads_first(o, key_heads)
    top = _heads_first(top[..., None], key_heads)[..., 0]
  return top, jnp.ones_like(top), a.astype(top.dtype)


def _take(cache, *, layer, start, size):
  """Slice [B, HK, L, D] of one layer's slots."""
  _, B, heads, _, D = cache.shape
  part = lax.dynamic_slice(
    cache, (layer, 0, 0, start, 0), (1, B, heads, size, D)
  )
  return part[0]


def _scores(q_BHGTD, k_BHLD):
  """Scores [B, HK, G, T, L]."""
  if q_BHGTD.shape[3] > 1:
    return product("bhgtd,bhld->bhgtl", q_BHGTD, k_BHLD)
  # On a CPU XLA transposes the second operand element by element, so the query,
  # which is the smaller one, comes second.
  dtype = jnp.promote_types(q_BHGTD.dtype, jnp.float32)
  scores_BHLG = lax.dot_general(
    k_BHLD,
    q_BHGTD[:, :, :, 0],
    (((3,), (3,)), ((0, 1), (0, 1))),
    precision=lax.Precision.HIGHEST if k_BHLD.dtype == dtype else None,
    preferred_element_type=dtype,
  )
  return jnp.moveaxis(scores_BHLG, 2, 3)[:, :, :, None]


def _add(seen, scores, v_BHLD):
  """Adds a block to the running sums; m is finite after the new tokens."""
  top, total, out = seen
  new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
  weights = jnp.exp(scores - new_top[..., None])
  shrink = jnp.exp(top - new_top)
  total = shrink * total + jnp.sum(weights, axis=-1)
  seen_here = product("bhgtl,bhld->bhgtd", weights.astype(v_BHLD.dtype), v_BHLD)
  return new_top, total, shrink[..., None] * out + seen_here
