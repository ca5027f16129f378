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

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from gdn2_jax.ops import gdn2_segments
from gdn2_jax.ops.gdn2_xla_tree import (
  chunk_tree,
  chunk_tree_vjp,
  matmul,
  rows,
  transpose,
)

# (starts, valid): where the state restarts, and which tokens are not padding.
Segments = tuple[Bool[Array, "B T"], Bool[Array, "B T"]]


def default_chunk_size() -> int:
  """Measured: 16 keeps a CPU core's caches, 64 fills a GPU's tensor cores."""
  return 16 if jax.default_backend() == "cpu" else 64


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
  C = min(C, 1 << (q.shape[1].bit_length() - 1))  # one full chunk or more
  segments = None
  if segment_ids is not None:
    starts = gdn2_segments.segment_starts(segment_ids)
    segments = (starts, segment_ids != 0)
  return _sequence(q, k, v, g, b, w, state, segments, scale, C)


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9))
def _sequence(q, k, v, g, b, w, state, segments, scale, C):
  o, state, _ = _forward((q, k, v, g, b, w), state, segments, scale, C)
  return o, state


def _sequence_fwd(q, k, v, g, b, w, state, segments, scale, C):
  inputs = (q, k, v, g, b, w)
  o, final, starts = _forward(
    inputs, state, segments, scale, C, keep_states=True
  )
  return (o, final), (inputs, starts, segments)


def _sequence_bwd(scale, C, residuals, cotangents):
  inputs, states, segments = residuals
  do, dstate = cotangents
  grads, dstate = _backward(inputs, states, segments, do, dstate, scale, C)
  return (*grads, dstate, None)


_sequence.defvjp(_sequence_fwd, _sequence_bwd)


def _forward(inputs, state, segments, scale, C, *, keep_states=False):
  """Runs the chunks; also returns the states at chunk starts if kept."""
  v = inputs[2]
  num_full = v.shape[1] // C

  def one_chunk(carry, start):
    S, o = carry
    chunk = _read_inputs(inputs, segments, start, C, scale, S.dtype)
    S_next, o_BHCV = _chunk(S, *chunk)
    return (S_next, _write(o, o_BHCV, start)), S if keep_states else None

  carry = (state, jnp.zeros_like(v))
  carry, states = lax.scan(one_chunk, carry, jnp.arange(num_full) * C)
  states = (states,)
  if v.shape[1] % C:
    carry, tail_state = one_chunk(carry, num_full * C)
    states = (*states, tail_state)
  state, o = carry
  return o, state, states


def _backward(inputs, states, segments, do, dstate, scale, C):
  """Runs the chunks backward from the states at their starts."""
  num_full = do.shape[1] // C

  def one_chunk(carry, xs):
    dS, grads = carry
    start, S = xs
    # S is also needed transposed; without the barrier XLA gathers it from the
    # stack of states element by element.
    S = lax.optimization_barrier(S)
    chunk = _read_inputs(inputs, segments, start, C, scale, S.dtype)
    dO = _read(do, start, C, S.dtype)
    if segments is not None:
      dO = jnp.where(_read_mask(segments[1], start, C), dO, 0)
    dS, (dq, *others) = _chunk_vjp(dS, dO, S, *chunk)
    chunk_grads = (dq * scale, *others)
    if segments is not None:
      # Padding was replaced by zeros on the way in: no gradient passes.
      valid = _read_mask(segments[1], start, C)
      chunk_grads = (jnp.where(valid, x, 0) for x in chunk_grads)
    grads = tuple(
      _write(x, dx, start) for x, dx in zip(grads, chunk_grads, strict=True)
    )
    return (dS, grads), None

  carry = (dstate, tuple(jnp.zeros_like(x) for x in inputs))
  if do.shape[1] % C:
    carry, _ = one_chunk(carry, (num_full * C, states[1]))
  xs = (jnp.arange(num_full) * C, states[0])
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


def _read_inputs(inputs, segments, start, C, scale, dtype):
  """The six inputs of a chunk, [B, H, C, *], q scaled, segments applied."""
  q, k, v, g, b, w = (_read(x, start, C, dtype) for x in inputs)
  if segments is not None:
    # Zeros leave the state alone, whatever stood in the padding; a decay of
    # exp(-inf) = 0 restarts it.
    valid = _read_mask(segments[1], start, C)
    q, k, v, g, b, w = (jnp.where(valid, x, 0) for x in (q, k, v, g, b, w))
    g = jnp.where(_read_mask(segments[0], start, C), -jnp.inf, g)
  return q * scale, k, v, g, b, w


def _read(x, start, C, dtype):
  """Tokens [start, start + C) as [B, H, C, *]; zeros after the end."""
  if isinstance(start, int):  # the tail, shorter than a chunk
    x = x[:, start:]
    x = jnp.pad(x, ((0, 0), (0, C - x.shape[1]), (0, 0), (0, 0)))
  else:
    x = lax.dynamic_slice_in_dim(x, start, C, axis=1)
  return jnp.swapaxes(x, 1, 2).astype(dtype)


def _read_mask(mask, start, C):
  return _read(mask[:, :, None, None], start, C, jnp.bool)


def _write(x, chunk, start):
  """Writes [B, H, C, *] to the tokens from start on, up to the end of x."""
  chunk = jnp.swapaxes(chunk, 1, 2).astype(x.dtype)
  if isinstance(start, int):
    chunk = chunk[:, : x.shape[1] - start]
  return lax.dynamic_update_slice_in_dim(x, chunk, start, axis=1)


def gdn2_step_xla(
  q: Float[Array, "B H K"],
  k: Float[Array, "B H K"],
  v: Float[Array, "B H V"],
  g: Float[Array, "B H K"],
  b: Float[Array, "B H K"],
  w: Float[Array, "B H V"],
  state: Float[Array, "B H K V"],
  scale: float,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
  """One token of Eq. 10 that reads the state once for erase and output.

  With alpha = exp(g) and e = b*k, S'^T q = S^T (alpha*q) + (q.k) u where
  u = w*v - S^T (alpha*e), so that both products come from the old state.
  """
  out_dtype = v.dtype
  q, k, v, g, b, w = (x.astype(state.dtype) for x in (q, k, v, g, b, w))
  q = q * scale
  alpha = jnp.exp(g)
  eq = jnp.stack([alpha * b * k, alpha * q], axis=-2)
  eq_S = matmul(eq, state)
  u = w * v - eq_S[..., 0, :]
  o = eq_S[..., 1, :] + (q * k).sum(-1, keepdims=True) * u
  state = alpha[..., None] * state + k[..., None] * u[..., None, :]
  return o.astype(out_dtype), state
