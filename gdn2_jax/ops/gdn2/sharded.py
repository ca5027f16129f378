"""Gated DeltaNet-2 over a sequence that is split over devices.

Under shard_map every device holds the tokens [B, T, ...] of one shard; shards
are ordered along the mesh axis. The op runs twice. The first run has the values
[v | 0] and starts from the state [0 | I], so that its final state is the
shard's affine map [U | M]. The second run starts from the state that the maps
of all earlier shards give. If a document begins in the shard or at its first
token, M is exactly zero. The backward pass of the op runs once.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from gdn2_jax.ops.context.borders import continues, from_rank, vary_together
from gdn2_jax.ops.context.states import Scheme, choose_scheme, start_states
from gdn2_jax.ops.gdn2 import dispatch
from gdn2_jax.ops.gdn2.inputs import dtype_of


class Options(NamedTuple):
  """Static arguments of a call over shards.

  Attributes:
    axis_name: Mesh axis that the tokens are split over.
    scale: Factor on the output.
    name: Implementation that runs the op.
    implementation: The caller's argument, also used for the map with its V + K
      value channels.
    scheme: The caller's argument; then the scheme that was chosen.
  """

  axis_name: str
  scale: float
  name: str
  implementation: str | None
  scheme: Scheme | None


def gdn2_on_shards(inputs, state, segment_ids, options):
  """Output of this shard, and the state after the whole sequence."""
  q, axis_name = inputs[0], options.axis_name
  devices = lax.axis_size(axis_name)
  scheme = choose_scheme(options.scheme, devices, q.shape[0] * q.shape[2])
  options = options._replace(scheme=scheme)
  if devices == 1:
    o, end = _shard(inputs, state, segment_ids, options)
  else:
    keep = None
    if segment_ids is not None:
      keep = continues(segment_ids, axis_name=axis_name)[:, None, None, None]
    o, end = _chained(inputs, state, segment_ids, keep, options)
  return o, from_rank(end, devices - 1, axis_name=axis_name)


def _shard(inputs, start, segment_ids, options):
  """Runs the op over this shard from its start state."""
  run = dispatch.sequence_of(options.name)
  return dispatch.run_folded(run, *inputs, start, segment_ids, options.scale)


def _start(inputs, state, segment_ids, keep, options):
  """Start state of this shard, and what its backward pass needs of the map."""
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


# A hand-written gradient, because the gradient of a shard's start state is
# affine in that of its end state,
#   dS_r = M_r^T dS_{r+1} + D_r,   D_r = scale * sum_t reads_t do_t^T,
# and passes from shard to shard as the state does, in the other direction. One
# backward pass of the op follows; the maps need none.
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
  do, dend = cotangents  # dend is zero except on the last device
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
  implementation: str | None = None,
) -> tuple[
  Float[Array, "B H K K"], Float[Array, "B H K VH"], Float[Array, "B T H K"]
]:
  """Affine map (M, U) of these tokens on a state S, and its reads.

    S -> M S + U,   q_t^T S_t = reads_t^T S + terms without S

  U has the value heads of a key head folded, VH = HV // H * V. All results are
  float32 (float64 if an input is); kernels return reads in the dtype of v. The
  gradient in `_chained` does not differentiate this function.
  """
  B, _, H, K = q.shape
  dtype = dtype_of(q, k, v, g, b, w)
  v, w = (dispatch.fold_values(x, H) for x in (v, w))
  V = v.shape[-1]
  v, w = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, K))) for x in (v, w))
  zeros_and_one = jnp.eye(K, V + K, V, dtype=dtype)[None, None]
  state = jnp.broadcast_to(zeros_and_one, (B, H, K, V + K))
  name = dispatch.resolve(implementation, q, k, v, g, b, w, step=False)
  if name in ("reference", "xla"):
    # They return reads in the dtype of v; rounded reads would make the
    # gradients of all earlier shards less accurate. Kernels take 16 bits only.
    v, w = v.astype(dtype), w.astype(dtype)
  *inputs, state = vary_together((q, k, v, g, b, w, state))
  run = dispatch.sequence_of(name)
  o, end = run(*inputs, state, segment_ids, 1.0)
  return end[..., V:], end[..., :V], o[..., V:]
