"""The sequence ops on one shard of sequences that are split over devices.

Under shard_map every device calls these with the tokens [B, T, ...] that it
holds, T the same on all devices and the shards in the order of the mesh axis.
Results, states in and out and gradients are those of the whole sequence:

  gdn2_context         the state between shards, by context_states.py
  short_conv_context   the last W - 1 inputs of the shard before
  attention_context    keys and values of the last window - 1 tokens

States that come in and go out are those of the whole sequence, the same on all
devices. No message grows with T, but for windows longer than T.
"""

import functools
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from gdn2_jax.ops.attention.api import sliding_window_attention
from gdn2_jax.ops.context.borders import (
  check_axis,
  continues,
  from_rank,
  left_halo,
  vary,
)
from gdn2_jax.ops.context.states import Scheme, choose_scheme, start_states
from gdn2_jax.ops.gdn2 import dispatch
from gdn2_jax.ops.gdn2 import inputs as gdn2_inputs
from gdn2_jax.ops.gdn2.api import Implementation, gdn2
from gdn2_jax.ops.short_conv import short_conv


# As in gdn2: a wrong shape must reach the checks, which name the argument.
@no_type_check
def gdn2_context(
  q: Float[Array, "B T H K"],
  k: Float[Array, "B T H K"],
  v: Float[Array, "B T HV V"],
  g: Float[Array, "B T H K"],
  b: Float[Array, "B T H K"],
  w: Float[Array, "B T HV V"],
  *,
  axis_name: str,
  scale: float | None = None,
  state: Float[Array, "B HV K V"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  implementation: Implementation | None = None,
  scheme: Scheme | None = None,
) -> tuple[Float[Array, "B T HV V"], Float[Array, "B HV K V"]]:
  """gdn2 (Eq. 10) over a sequence of which this device holds one shard.

  The op runs twice: once with the values [v | 0] from the state [0 | I], whose
  final state is the shard's affine map [U | M], and once from the state that
  the maps of the shards before give. A document that begins in the shard makes
  M exactly zero, and so does one that begins at its border. Backward runs once.

  Args:
    q: Queries of this shard [B, T, H, K]; the arguments are those of gdn2.
    k: Keys.
    v: Values [B, T, HV, V].
    g: Log-decay.
    b: Erase gate.
    w: Write gate.
    axis_name: The mesh axis that the sequence is split over.
    scale: Factor on the output; None is K**-0.5.
    state: The state before the whole sequence, the same on all devices; None
      is zeros.
    segment_ids: [B, T], 0 for padding; the id of the last token before the
      shard and that of its first one decide whether the state continues.
    implementation: Of the op, as in gdn2; it must also take the V + K value
      channels of the first run.
    scheme: How states pass between shards; see context_states.py.

  Returns:
    o [B, T, HV, V] of this shard, and the state after the whole sequence, the
    same on all devices (where it is not used, it is not exchanged).

  Raises:
    ValueError: as gdn2, or axis_name or scheme is wrong.
    NotImplementedError: as gdn2.
  """
  devices = check_axis(axis_name)
  q, k, v, g, b, w = gdn2_inputs.check_inputs(q, k, v, g, b, w, time_axis=True)
  dtype = gdn2_inputs.dtype_of(q, k, v, g, b, w)
  state = gdn2_inputs.check_state(state, q, v, dtype)
  segment_ids = gdn2_inputs.check_segment_ids(segment_ids, q.shape[:2])
  scheme = choose_scheme(scheme, devices, q.shape[0] * q.shape[2])
  *inputs, state, segment_ids = gdn2_inputs.vary_together(
    (q, k, v, g, b, w, vary(state, axis_name), segment_ids)
  )
  options = _Options(
    axis_name,
    gdn2_inputs.check_scale(scale, q.shape[-1]),
    implementation,
    scheme,
  )
  if devices == 1:
    o, end = _shard(tuple(inputs), state, segment_ids, options)
  else:
    keep = None
    if segment_ids is not None:
      keep = continues(segment_ids, axis_name=axis_name)[:, None, None, None]
    o, end = _chained(tuple(inputs), state, segment_ids, keep, options)
  return o, from_rank(end, devices - 1, axis_name=axis_name)


class _Options(NamedTuple):
  axis_name: str
  scale: float
  implementation: Implementation | None
  scheme: Scheme


def _shard(inputs, start, segment_ids, options):
  """The op over this shard from its start state."""
  return gdn2(
    *inputs,
    state=start,
    segment_ids=segment_ids,
    scale=options.scale,
    implementation=options.implementation,
  )


def _start(inputs, state, segment_ids, keep, options):
  """The start state of this shard; M and reads of its map, for the backward."""
  M, U, reads = affine_map(
    *inputs, segment_ids=segment_ids, implementation=options.implementation
  )
  M = _mask(keep, M)
  start = start_states(
    M,
    U,
    dispatch.fold_state(state, M.shape[1]),
    axis_name=options.axis_name,
    scheme=options.scheme,
  )
  start = dispatch.unfold_state(_mask(keep, start), state.shape)
  return start, M, reads


def _mask(keep, x):
  return x if keep is None else jnp.where(keep, x, 0)


# Differentiated as the op is, shard by shard. The gradient of a shard's start
# state is affine in that of its end state,
#   dS_r = M_r^T dS_{r+1} + D_r,   D_r = scale * sum_t reads_t do_t^T,
# so it goes from shard to shard as the state does, the other way. Then one
# backward pass of the op has all it needs: none goes through the maps.
@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chained(inputs, state, segment_ids, keep, options):
  start, _, _ = _start(inputs, state, segment_ids, keep, options)
  return _shard(inputs, start, segment_ids, options)


def _chained_fwd(inputs, state, segment_ids, keep, options):
  start, M, reads = _start(inputs, state, segment_ids, keep, options)
  outputs, pullback = jax.vjp(
    lambda inputs, start: _shard(inputs, start, segment_ids, options),
    inputs,
    start,
  )
  return outputs, (pullback, M, reads, keep)


def _chained_bwd(options, residuals, cotangents):
  pullback, M, reads, keep = residuals
  do, dend = cotangents  # dend is zero but on the last device
  D = options.scale * jnp.einsum(
    "bthk,bthv->bhkv",
    reads,
    dispatch.fold_values(do, M.shape[1]),
    precision=lax.Precision.HIGHEST,
    preferred_element_type=M.dtype,
  )
  dend_folded = start_states(
    jnp.swapaxes(M, -1, -2),
    _mask(keep, D),
    dispatch.fold_state(dend, M.shape[1]),
    axis_name=options.axis_name,
    scheme=options.scheme,
    reverse=True,
  )
  dend = dispatch.unfold_state(dend_folded, dend.shape)
  dinputs, dstart = pullback((do, dend))
  is_first = lax.axis_index(options.axis_name) == 0
  dstate = jnp.where(is_first, _mask(keep, dstart), 0)
  return dinputs, dstate, None, None


_chained.defvjp(_chained_fwd, _chained_bwd)


def affine_map(
  q: Float[Array, "B T H K"],
  k: Float[Array, "B T H K"],
  v: Float[Array, "B T HV V"],
  g: Float[Array, "B T H K"],
  b: Float[Array, "B T H K"],
  w: Float[Array, "B T HV V"],
  *,
  segment_ids: Int[Array, "B T"] | None = None,
  implementation: Implementation | None = None,
) -> tuple[
  Float[Array, "B H K K"], Float[Array, "B H K VH"], Float[Array, "B T H K"]
]:
  """What Eq. 10 does to a state over these tokens, and what they read of it.

    S -> M S + U,   q_t^T S_t = reads_t^T S + (what they read without it)

  The op with the values [v | 0] from the state [0 | I]. Not differentiated:
  gdn2_context does without.

  Args:
    q: Queries, checked by the caller like the others.
    k: Keys.
    v: Values.
    g: Log-decay.
    b: Erase gate.
    w: Write gate.
    segment_ids: [B, T] or None; a restart inside makes M exactly zero.
    implementation: Of the op, for V + K value channels.

  Returns:
    M, and U with the value heads of a key head side by side, VH = HV // H * V,
    both float32 (float64 where an input is); reads are too, but by kernels in
    the dtype of v.

  Raises:
    NotImplementedError: the named implementation cannot run this call.
  """
  B, _, H, K = q.shape
  dtype = gdn2_inputs.dtype_of(q, k, v, g, b, w)
  v, w = (dispatch.fold_values(x, H) for x in (v, w))
  V = v.shape[-1]
  v, w = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, K))) for x in (v, w))
  zeros_and_one = jnp.eye(K, V + K, V, dtype=dtype)[None, None]
  state = jnp.broadcast_to(zeros_and_one, (B, H, K, V + K))
  name = dispatch.resolve(implementation, q, k, v, g, b, w, step=False)
  if name in ("reference", "xla"):
    # They return reads in the dtype of v, and rounding it would cost accuracy
    # in the gradients of everything before. Kernels take 16 bits only.
    v, w = v.astype(dtype), w.astype(dtype)
  *inputs, state = gdn2_inputs.vary_together((q, k, v, g, b, w, state))
  run = dispatch.sequence_of(name)
  o, end = run(*inputs, state, segment_ids, 1.0)
  return end[..., V:], end[..., :V], o[..., V:]


def short_conv_context(
  x: Float[Array, "B T C"],
  kernel: Float[Array, "W C"],
  *,
  axis_name: str,
  bias: Float[Array, " C"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  state: Float[Array, "B W-1 C"] | None = None,
  **options: Any,
) -> tuple[Float[Array, "B T C"], Float[Array, "B W-1 C"]]:
  """short_conv over a sequence of which this device holds one shard.

  Args:
    x: Inputs of this shard [B, T, C], T >= W - 1.
    kernel: [W, C]; the arguments are those of short_conv.
    axis_name: The mesh axis that the sequence is split over.
    bias: [C] or None.
    segment_ids: [B, T] or None.
    state: The inputs before the whole sequence [B, W-1, C], the same on all
      devices; None for zeros.
    **options: activation and implementation of short_conv.

  Returns:
    y [B, T, C] of this shard, and the state after the whole sequence, the same
    on all devices.

  Raises:
    ValueError: as short_conv, or axis_name is wrong, or T < W - 1.
  """
  devices = check_axis(axis_name)
  taps = kernel.shape[0] - 1
  if x.ndim != 3 or x.shape[1] < taps:
    raise ValueError(
      f"x: expected [B, T, C] with T >= {taps} tokens to a device for a kernel"
      f" of {taps + 1} taps, got {x.shape}"
    )
  # The kernel before it meets x: its gradient is then summed over devices as
  # [W, C], and not where the two have met.
  x, kernel, bias, segment_ids, state = gdn2_inputs.vary_together(
    (vary(x, axis_name), kernel, bias, segment_ids, state)
  )
  halo = left_halo(x, taps, axis_name=axis_name)
  if segment_ids is not None:
    ids = left_halo(segment_ids, taps, axis_name=axis_name)
    # Only what lies in the unbroken segment of the first token here.
    same = (ids == segment_ids[:, :1]).astype(jnp.int32)
    same = jnp.flip(jnp.cumprod(jnp.flip(same, axis=1), axis=1), axis=1)
    halo = jnp.where(same[:, :, None] == 1, halo, 0)
  if state is not None:
    rank = lax.axis_index(axis_name)
    halo = jnp.where(rank == 0, state, halo)
  y, end = short_conv(
    x, kernel, bias=bias, segment_ids=segment_ids, state=halo, **options
  )
  last = devices - 1
  if segment_ids is not None:
    # Padding at the end of a row may fill whole shards.
    is_empty = (segment_ids == 0).all(axis=1)
    ranks = jnp.where(is_empty, 0, lax.axis_index(axis_name))
    last = lax.pmax(ranks, axis_name)
  return y, from_rank(end, last, axis_name=axis_name)


def attention_context(
  q: Float[Array, "B T HQ D"],
  k: Float[Array, "B T HKV D"],
  v: Float[Array, "B T HKV D"],
  *,
  axis_name: str,
  window: int | None,
  segment_ids: Int[Array, "B T"] | None = None,
  scale: float | None = None,
  implementation: str | None = None,
) -> Float[Array, "B T HQ D"]:
  """sliding_window_attention over rows of which this device holds one shard.

  Args:
    q: Queries of this shard [B, T, HQ, D], already rotated.
    k: Keys of this shard [B, T, HKV, D], already rotated.
    v: Values of this shard.
    axis_name: The mesh axis that the sequence is split over.
    window: Keys that a query sees, itself included; None for all. Beyond T + 1
      the keys come from several shards, a message for each.
    segment_ids: [B, T], 0 for padding, distinct along the whole row for
      distinct segments (context_borders.runs_and_positions makes them).
    scale: Multiplies the scores; None for D^-0.5.
    implementation: As in sliding_window_attention.

  Returns:
    [B, T, HQ, D] in q.dtype.

  Raises:
    ValueError: as sliding_window_attention, or axis_name is wrong.
    NotImplementedError: as sliding_window_attention.
  """
  devices = check_axis(axis_name)
  B, T = q.shape[:2]
  before = (devices - 1) * T
  if window is not None:
    before = min(max(window - 1, 0), before)
  if segment_ids is None and devices > 1:
    # The first shard has no tokens before it, though it has a halo.
    segment_ids = vary(jnp.ones((B, T), jnp.int32), axis_name)
  kv_ids = segment_ids
  if before:
    k, v, kv_ids = (
      jnp.concatenate([left_halo(x, before, axis_name=axis_name), x], axis=1)
      for x in (k, v, segment_ids)
    )
  return sliding_window_attention(
    q,
    k,
    v,
    window=window,
    q_segment_ids=segment_ids,
    kv_segment_ids=kv_ids,
    scale=scale,
    implementation=implementation,
  )
