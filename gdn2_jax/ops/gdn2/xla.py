"""Chunkwise Gated DeltaNet-2 with a hand-written backward pass.

Legend: B batch, T time, H key heads, K key channels, V value channels of all
the value heads of a key head, C tokens of a chunk.

One chunk, from the state S at its start (section 3.3; appendix A), with A, M
and the decays prefix and suffix of gdn2_xla_tree.py, e = b*k and z = w*v:

  R = A (z - (e*prefix) S)
  O = (q*prefix) S + M R
  S' = Diag(prefix_C) S + (k*suffix)^T R

One loop slices every chunk from the inputs [B, T, H, *] in place: no array of
size T is copied or transposed. The backward pass keeps the inputs and the
states at the chunk starts.

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

# (starts, valid): True where the state restarts, and where a token is no
# padding.
Segments = tuple[Bool[Array, "B T"], Bool[Array, "B T"]]


def default_chunk_size() -> int:
  """Tokens per chunk: 16 on a CPU, as measured; 64 elsewhere, not measured."""
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
  """Chunkwise Eq. 10, computed in the dtype of `state`.

  Arguments are those of gdn2 with folded value heads. chunk_size is a power of
  two; None is the backend's default, or less for a short sequence.
  """
  C = default_chunk_size() if chunk_size is None else chunk_size
  if C < 1 or C & (C - 1):
    raise ValueError(
      f"gdn2_xla: chunk_size: got {chunk_size}, expected a power of two"
    )
  C = min(C, 1 << (q.shape[1].bit_length() - 1))  # at most T
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
  """Runs the chunks in order; keep_states also returns the start states."""
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
  """Backward pass: runs the chunks in reverse from their start states."""

  def one_chunk(carry, xs):
    dS, grads = carry
    n, S = xs
    # S is also used transposed. Without the barrier XLA fuses the transpose
    # with the slice of all states and gathers it element by element.
    S = lax.optimization_barrier(S)
    at = _locate(n, do.shape[1], C, segments)
    dO = _read(do, at, S.dtype)
    dS, (dq, *others) = _chunk_vjp(
      dS, dO, S, *_read_inputs(inputs, at, scale, S.dtype)
    )
    if segments is not None:
      # Padding was replaced by zeros when it was read: its gradient is zero.
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
  """Final state and outputs of one chunk."""
  C = q.shape[-2]
  e = b * k
  tree = chunk_tree(jnp.exp(g), e, q, k)
  # One product with S gives both the erased and the read values.
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
  """Gradients of one chunk: dS at its start, and (dq, dk, dv, dg, db, dw)."""
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
  """Position and masks of a chunk; a mask is [B or 1, 1, C, 1] or None."""

  start: Int[Array, ""]
  size: int
  fresh: Bool[Array, "1 1 C 1"] | None
  valid: Bool[Array, "_ 1 C 1"] | None
  restart: Bool[Array, "B 1 C 1"] | None


def _locate(n, T, C, segments):
  """Position and masks of chunk n.

  If C does not divide T, the last chunk still ends at T and overlaps the one
  before it. The overlapping tokens are not `fresh`: they are read as padding
  and their outputs are not written.
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
  """Reads the tokens of a chunk as [B, H, C, *], zeros at padding."""
  x = lax.dynamic_slice_in_dim(x, at.start, at.size, axis=1)
  x = jnp.swapaxes(x, 1, 2).astype(dtype)
  return x if at.valid is None else jnp.where(at.valid, x, 0)


def _read_inputs(inputs, at, scale, dtype):
  """Reads the six inputs of a chunk, q scaled, g = -inf at restarts."""
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
