"""Gated DeltaNet-2, chunk by chunk, with a hand-written backward pass.

Legend: B batch, T time, H key heads, K key channels, V value channels of all
the value heads of a key head, C tokens of a chunk.

One chunk, from the state S at its start (section 3.3; appendix A), with A, M
and the decays prefix and suffix of gdn2_xla_tree.py, e = b*k and z = w*v:

  R = A (z - (e*prefix) S)
  O = (q*prefix) S + M R
  S' = Diag(prefix_C) S + (k*suffix)^T R

A single loop does whole chunks, slicing them from [B, T, H, *] itself: nothing
of size T is ever copied or rearranged. Saved for the backward pass are the
inputs and the states at the chunk starts.

Backward (section 3.4; appendix B, rearranged so that neither dA nor A^T dA A^T
is needed): with dR = M^T dO + (k*suffix) dS' and dz = A^T dR,

  dT = -tril(dz R^T, -1),  dM = tril(dO R^T),  d(e*prefix) = -dz S^T,
  dS = Diag(prefix_C) dS' + (q*prefix)^T dO - (e*prefix)^T dz.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from gdn2_jax.kernels.target import backend
from gdn2_jax.ops.gdn2.xla_tree import (
  chunk_tree,
  chunk_tree_vjp,
  matmul,
  rows,
  transpose,
)
from gdn2_jax.ops.segments import segment_starts

# (starts, valid): where the state restarts, and which tokens are not padding.
Segments = tuple[Bool[Array, "B T"], Bool[Array, "B T"]]


def default_chunk_size() -> int:
  """Tokens of a chunk: 16 on a CPU, as measured; 64 elsewhere, unmeasured."""
  return 16 if backend() == "cpu" else 64


def gdn2_xla(
  q: Float[Array, "B T H K"],
  k: Float[Array, "B T H K"],
  v: Float[Array, "B T H V"],
  g: Float[Array, "B T H K"],
  b: Float[Array, "B T H K"],
  w: Float[Array, "B T H V"],
  state: Float[Array, "B H K V"],
  segment_ids: Int[Array, "B T"] | None,
  scale: float,
  chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
  """Chunkwise Eq. 10, computing in the dtype of `state`.

  Args:
    q: Queries; see gdn2 for this and the other inputs.
    k: Keys.
    v: Values.
    g: Log-decay.
    b: Erase gate.
    w: Write gate.
    state: Incoming state.
    segment_ids: Segments, 0 for padding, or None.
    scale: Factor on the output.
    chunk_size: Tokens of a chunk, a power of two; None is the default of the
      backend. A shorter sequence takes the largest one that fits.

  Returns:
    o in the dtype of v, and the final state.
  """
  C = default_chunk_size() if chunk_size is None else chunk_size
  if C < 1 or C & (C - 1):
    raise ValueError(
      f"gdn2_xla: chunk_size: got {chunk_size}, expected a power of two"
    )
  C = min(C, 1 << (q.shape[1].bit_length() - 1))  # the last chunk ends at T
  segments = None
  if segment_ids is not None:
    starts = segment_starts(segment_ids)
    segments = (starts, segment_ids != 0)
  return _sequence(q, k, v, g, b, w, state, segments, scale, C)


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9))
def _sequence(q, k, v, g, b, w, state, segments, scale, C):
  o, state, _ = _forward((q, k, v, g, b, w), state, segments, scale, C)
  return o, state


def _sequence_fwd(q, k, v, g, b, w, state, segments, scale, C):
  inputs = (q, k, v, g, b, w)
  o, final, states = _forward(
    inputs, state, segments, scale, C, keep_states=True
  )
  return (o, final), (inputs, states, segments)


def _sequence_bwd(scale, C, residuals, cotangents):
  inputs, states, segments = residuals
  do, dstate = cotangents
  grads, dstate = _backward(inputs, states, segments, do, dstate, scale, C)
  return (*grads, dstate, None)


_sequence.defvjp(_sequence_fwd, _sequence_bwd)


def _forward(inputs, state, segments, scale, C, *, keep_states=False):
  """Runs the chunks; also returns the states at chunk starts if kept."""
  v = inputs[2]

  def one_chunk(carry, n):
    S, o = carry
    at = _locate(n, v.shape[1], C, segments)
    S_next, o_BHCV = _chunk(S, *_read_inputs(inputs, at, scale, S.dtype))
    return (S_next, _write(o, o_BHCV, at)), S if keep_states else None

  N = -(-v.shape[1] // C)
  carry = (state, jnp.zeros_like(v))
  (state, o), states = lax.scan(one_chunk, carry, jnp.arange(N))
  return o, state, states


def _backward(inputs, states, segments, do, dstate, scale, C):
  """Runs the chunks backward from the states at their starts."""

  def one_chunk(carry, xs):
    dS, grads = carry
    n, S = xs
    # S is also needed transposed; without the barrier XLA gathers it from the
    # stack of states element by element.
    S = lax.optimization_barrier(S)
    at = _locate(n, do.shape[1], C, segments)
    dO = _read(do, at, S.dtype)
    dS, (dq, *others) = _chunk_vjp(
      dS, dO, S, *_read_inputs(inputs, at, scale, S.dtype)
    )
    if segments is not None:
      # Padding was replaced by zeros on the way in: no gradient passes.
      dq, *others = (jnp.where(at.valid, x, 0) for x in (dq, *others))
    grads = tuple(
      _write(x, dx, at)
      for x, dx in zip(grads, (dq * scale, *others), strict=True)
    )
    return (dS, grads), None

  carry = (dstate, tuple(jnp.zeros_like(x) for x in inputs))
  xs = (jnp.arange(states.shape[0]), states)
  (dstate, grads), _ = lax.scan(one_chunk, carry, xs, reverse=True)
  return grads, dstate


def _chunk(
  S: Float[Array, "B H K V"],
  q: Float[Array, "B H C K"],
  k: Float[Array, "B H C K"],
  v: Float[Array, "B H C V"],
  g: Float[Array, "B H C K"],
  b: Float[Array, "B H C K"],
  w: Float[Array, "B H C V"],
) -> tuple[Float[Array, "B H K V"], Float[Array, "B H C V"]]:
  """One chunk: the state after it and its outputs."""
  C = q.shape[-2]
  e = b * k
  tree = chunk_tree(jnp.exp(g), e, q, k)
  # One pass over S for what is erased and what is read.
  eq_S = matmul(rows(e * tree.prefix, q * tree.prefix), S)
  R = matmul(tree.A, w * v - eq_S[..., :C, :])
  o = eq_S[..., C:, :] + matmul(tree.M, R)
  decay = transpose(tree.prefix[..., -1:, :])
  return decay * S + matmul(transpose(k * tree.suffix), R), o


def _chunk_vjp(
  dS: Float[Array, "B H K V"],
  dO: Float[Array, "B H C V"],
  S: Float[Array, "B H K V"],
  q: Float[Array, "B H C K"],
  k: Float[Array, "B H C K"],
  v: Float[Array, "B H C V"],
  g: Float[Array, "B H C K"],
  b: Float[Array, "B H C K"],
  w: Float[Array, "B H C V"],
) -> tuple[Float[Array, "B H K V"], tuple[Float[Array, "B H C _"], ...]]:
  """One chunk backward: dS at its start, and dq dk dv dg db dw."""
  C = q.shape[-2]
  e = b * k
  tree = chunk_tree(jnp.exp(g), e, q, k)
  e_in, q_in, k_out = e * tree.prefix, q * tree.prefix, k * tree.suffix
  R = matmul(tree.A, w * v - matmul(e_in, S))

  dR = matmul(transpose(tree.M), dO) + matmul(k_out, dS)
  dz = matmul(transpose(tree.A), dR)
  dzO = rows(-dz, dO)
  deq_in = matmul(dzO, transpose(S))
  de_in, dq_in = deq_in[..., :C, :], deq_in[..., C:, :]
  dk_out = matmul(R, transpose(dS))
  dTM = matmul(dzO, transpose(R))

  # The decay of the state over the chunk is the prefix of its last token.
  decay = tree.prefix[..., -1, :]
  dlog_prefix = e_in * de_in + q_in * dq_in
  dlog_decay = decay * (dS * S).sum(-1)
  dlog_prefix = rows(
    dlog_prefix[..., :-1, :],
    dlog_prefix[..., -1:, :] + dlog_decay[..., None, :],
  )
  de, dq, dk, dg = chunk_tree_vjp(
    tree.levels,
    q,
    k,
    dTM[..., :C, :],
    dTM[..., C:, :],
    dlog_prefix,
    k_out * dk_out,
    (tree.prefix * de_in, tree.prefix * dq_in, tree.suffix * dk_out),
  )
  dS = (
    decay[..., None] * dS
    + matmul(transpose(q_in), dO)
    - matmul(transpose(e_in), dz)
  )
  return dS, (dq, dk + de * b, dz * w, dg, de * k, dz * v)


class _Place(NamedTuple):
  """Layout of a chunk; masks are [B or 1, 1, C, 1], or None if all True."""

  start: Int[Array, ""]
  size: int
  fresh: Bool[Array, "1 1 C 1"] | None
  valid: Bool[Array, "_ 1 C 1"] | None
  restart: Bool[Array, "B 1 C 1"] | None


def _locate(n, T, C, segments):
  """The place of chunk n.

  Where C does not divide T the last chunk ends at T and so overlaps the one
  before it. The tokens seen before are not fresh: they are read as padding,
  and not written.
  """
  start = jnp.minimum(n * C, T - C)
  fresh = valid = restart = None
  if T % C:
    fresh = (start + jnp.arange(C) >= n * C)[None, None, :, None]
    valid = fresh
  if segments is not None:
    restart, valid = (
      lax.dynamic_slice_in_dim(x, start, C, axis=1)[:, None, :, None]
      for x in segments
    )
    valid = valid if fresh is None else valid & fresh
  return _Place(start, C, fresh, valid, restart)


def _read(x, at, dtype):
  """The tokens of a chunk as [B, H, C, *]; zeros for padding."""
  x = lax.dynamic_slice_in_dim(x, at.start, at.size, axis=1)
  x = jnp.swapaxes(x, 1, 2).astype(dtype)
  return x if at.valid is None else jnp.where(at.valid, x, 0)


def _read_inputs(inputs, at, scale, dtype):
  """The six inputs of a chunk, q scaled, the state restarting by its decay."""
  q, k, v, g, b, w = (_read(x, at, dtype) for x in inputs)
  if at.restart is not None:
    g = jnp.where(at.valid & at.restart, -jnp.inf, g)
  return q * scale, k, v, g, b, w


def _write(x, chunk, at):
  """Writes [B, H, C, *] to the tokens of a chunk."""
  chunk = jnp.swapaxes(chunk, 1, 2).astype(x.dtype)
  if at.fresh is not None:
    old = lax.dynamic_slice_in_dim(x, at.start, at.size, axis=1)
    chunk = jnp.where(jnp.swapaxes(at.fresh, 1, 2), chunk, old)
  return lax.dynamic_update_slice_in_dim(x, chunk, at.start, axis=1)
