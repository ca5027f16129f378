"""Decayed scores within a chunk, the inverse of I + T, and their gradients.

Legend: B batch, H heads, C tokens of a chunk (a power of two), K key channels;
n blocks of h tokens, n * h = C. alpha = exp(g), e = b*k, and for r >= s

  decay_rs = alpha_{s+1} * ... * alpha_r
  T_rs     = sum_K e_r decay_rs k_s        (r > s)
  M_rs     = sum_K q_r decay_rs k_s        (r >= s)
  A        = (I + T)^-1

One binary tree over the tokens computes all of them, from single tokens up.
Every pair r > s belongs to exactly one level, where s is in an even block and r
in the odd block after it. There the decay splits at the border between the two,

  decay_rs = prefix_r * suffix_s,   prefix_r = product from the border to r,
                                    suffix_s = product from s to the border,

so the scores of a block pair are one matmul. Only g itself is exponentiated, so
every exponent is <= 0, and no large cumulative sums are subtracted. The border
never comes after r, so no result depends on later tokens. A restart is
alpha = 0, which makes the products across it exactly zero.

The same tree inverts I + T by blocks, without approximation (appendix D.4),

  [[I + T_ee, 0], [T_oe, I + T_oo]]^-1 = [[A_e, 0], [-A_o T_oe A_e, A_o]].
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# Full float32 products: TF32 would lose about ten bits, which the inverse
# amplifies.
matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def transpose(x: Float[Array, "*B R C"]) -> Float[Array, "*B C R"]:
  """Swaps the last two axes."""
  return jnp.swapaxes(x, -1, -2)


def rows(*xs: Float[Array, "..."]) -> Float[Array, "..."]:
  """Stacks matrices on top of each other."""
  return jnp.concatenate(xs, axis=-2)


class Level(NamedTuple):
  """Residuals of one level's pairs, for the backward pass."""

  eq: Float[Array, "B H n h2 K"]  # rows of odd e, then of odd q, times prefix
  k: Float[Array, "B H n h K"]  # even k times suffix
  prefix: Float[Array, "B H n h K"]  # of the odd blocks
  suffix: Float[Array, "B H n h K"]  # of the even blocks


class Tree(NamedTuple):
  """Scores and decays of a chunk."""

  A: Float[Array, "B H C C"]  # (I + T)^-1
  M: Float[Array, "B H C C"]
  prefix: Float[Array, "B H C K"]  # decay from the chunk start through r
  suffix: Float[Array, "B H C K"]  # decay after s to the chunk end
  levels: tuple[Level, ...]


def chunk_tree(
  alpha: Float[Array, "B H C K"],
  e: Float[Array, "B H C K"],
  q: Float[Array, "B H C K"],
  k: Float[Array, "B H C K"],
) -> Tree:
  """Builds A, M and the decays to both ends of the chunk."""
  C = alpha.shape[-2]
  e, q, k, prefix = (x[..., None, :] for x in (e, q, k, alpha))
  suffix = jnp.ones_like(prefix)
  A = jnp.ones((*prefix.shape[:-1], 1), alpha.dtype)
  M = (q * k).sum(-1, keepdims=True)
  levels = []
  h = 1
  while h < C:
    level = Level(
      eq=rows(_odd(e) * _odd(prefix), _odd(q) * _odd(prefix)),
      k=_even(k) * _even(suffix),
      prefix=_odd(prefix),
      suffix=_even(suffix),
    )
    scores = matmul(level.eq, transpose(level.k))
    T_oe, M_oe = _halves(scores)
    if h > 1:
      T_oe = matmul(_odd(A), matmul(T_oe, _even(A)))
    A = _lower(_even(A), -T_oe, _odd(A))
    M = _lower(_even(M), M_oe, _odd(M))
    # Extend the products over the merged block: prefixes of an odd block go
    # back through the even block before it, suffixes of an even block forward
    # through the odd block after it.
    even_total, odd_total = _last(_even(prefix)), _last(_odd(prefix))
    prefix = rows(_even(prefix), _odd(prefix) * even_total)
    suffix = rows(_even(suffix) * odd_total, _odd(suffix))
    e, q, k = (x.reshape(prefix.shape) for x in (e, q, k))
    levels.append(level)
    h *= 2
  A, M, prefix, suffix = (x[..., 0, :, :] for x in (A, M, prefix, suffix))
  return Tree(A, M, prefix, suffix, tuple(levels))


def chunk_tree_vjp(
  levels: tuple[Level, ...],
  q: Float[Array, "B H C K"],
  k: Float[Array, "B H C K"],
  dT: Float[Array, "B H C C"],
  dM: Float[Array, "B H C C"],
  dlog_prefix: Float[Array, "B H C K"],
  dlog_suffix: Float[Array, "B H C K"],
  deqk: tuple[Float[Array, "B H C K"], ...],
) -> tuple[Float[Array, "B H C K"], ...]:
  """Backward pass of chunk_tree, from the whole chunk down to single tokens.

  The gradient of a log-decay is the product of a decayed quantity and its
  cotangent, and dg is a sum of such products. The pairs r = s have no decay and
  contribute nothing.

  Args:
    levels: Residuals of chunk_tree.
    q: Scaled queries.
    k: Keys.
    dT: Cotangent of T; entries on and above the diagonal are not read.
    dM: Cotangent of M; entries above the diagonal are not read.
    dlog_prefix: Cotangent of log(prefix) from the products with the state.
    dlog_suffix: Cotangent of log(suffix) from the products with the state.
    deqk: Cotangents of e, q and k from the products with the state.

  Returns:
    de, dq, dk and dg, including the terms given in deqk.
  """
  dT, dM, dlog_prefix, dlog_suffix, de, dq, dk = (
    x[..., None, :, :] for x in (dT, dM, dlog_prefix, dlog_suffix, *deqk)
  )
  for level in reversed(levels):
    (dT_e, dT_o), (dM_e, dM_o) = _halves(dT), _halves(dM)
    h = dT_o.shape[-2]
    dscores = rows(dT_o[..., :h], dM_o[..., :h])
    deq = matmul(dscores, level.k)
    dk_e = matmul(transpose(dscores), level.eq)
    dT = _interleave(dT_e[..., :h], dT_o[..., h:])
    dM = _interleave(dM_e[..., :h], dM_o[..., h:])

    e_log, q_log = _halves(level.eq * deq)
    prefix_e, prefix_o = _halves(dlog_prefix)
    suffix_e, suffix_o = _halves(dlog_suffix)
    prefix_e = _add_last(prefix_e, prefix_o.sum(-2, keepdims=True))
    prefix_o = _add_last(
      prefix_o + e_log + q_log, suffix_e.sum(-2, keepdims=True)
    )
    suffix_e = suffix_e + level.k * dk_e
    dlog_prefix = _interleave(prefix_e, prefix_o)
    dlog_suffix = _interleave(suffix_e, suffix_o)

    de_o, dq_o = _halves(deq)
    de, dq, dk = (_split(x) for x in (de, dq, dk))
    de = _add_odd(de, de_o * level.prefix)
    dq = _add_odd(dq, dq_o * level.prefix)
    dk = _add_even(dk, dk_e * level.suffix)
  de, dq, dk, dg, diagonal = (
    x[..., 0, :] for x in (de, dq, dk, dlog_prefix, dM)
  )
  return de, dq + diagonal * k, dk + diagonal * q, dg


def _even(x):
  return x[..., 0::2, :, :]


def _odd(x):
  return x[..., 1::2, :, :]


def _last(x):
  return x[..., -1:, :]


def _halves(x):
  h = x.shape[-2] // 2
  return x[..., :h, :], x[..., h:, :]


def _split(x):
  """Splits every block of 2h tokens into two blocks of h."""
  *batch, n, h2, d = x.shape
  return x.reshape(*batch, 2 * n, h2 // 2, d)


def _interleave(even, odd):
  """Merges even and odd blocks into token order."""
  return _split(rows(even, odd))


def _lower(even, oe, odd):
  """Block matrix [[even, 0], [oe, odd]]."""
  top = jnp.concatenate([even, jnp.zeros_like(even)], axis=-1)
  return rows(top, jnp.concatenate([oe, odd], axis=-1))


def _add_last(x, total):
  return rows(x[..., :-1, :], _last(x) + total)


def _add_even(x, y):
  return _interleave(_even(x) + y, _odd(x))


def _add_odd(x, y):
  return _interleave(_even(x), _odd(x) + y)
