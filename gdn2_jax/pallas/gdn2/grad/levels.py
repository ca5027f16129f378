"""Gradients through the tree of decays of a chunk (README.md section 5).

This is the second half of intra_grad.py: from the gradients of -T, Aqk, E, Qg,
Kd and gamma_C to those of q, k, b and g. Legend: half a block of a level has
`half` tokens; r is a token of the second half, s one of the first.

  P_r  decay from the start of the second half to r     x_r = -e_r P_r, q_r P_r
  S_s  decay after s up to the end of the first half    x_s = k_s S_s

Going down the levels, from blocks of 64 tokens to single ones, the gradients of
-e, q and k are kept as those of factors of the decays below the level, as a
state is: with o the decay of the other half,

  d(-e)_r = o d(-e)_r + d(-T) x_s       dq_r = o dq_r + dAqk x_s
  dk_s = o dk_s + d(-T)^T x_r + dAqk^T q_r P_r

where d(-T) and dAqk have the entries of the level. The first terms bring the
gradient of all levels above, times the decays there. The gradient of log o is
what flows through it, and d(log-decay) of a block is that of the block it is
half of, plus that: `flow`, of which all tokens of a block hold a part, so it
goes down by one exchange per level. In the end it is the gradient of the decay
of one token. No difference of large numbers occurs.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gdn2_jax.pallas import blocks
from gdn2_jax.pallas.blocks import ROWS, TILE, C
from gdn2_jax.pallas.gdn2.grad import columns, diagonals, gates
from gdn2_jax.pallas.gdn2.grad.columns import BLOCK, HALF, LEVELS
from gdn2_jax.pallas.gdn2.grad.memory import HALVES
from gdn2_jax.pallas.gdn2.grad.products import Operand, dots
from gdn2_jax.pallas.gdn2.grad.values import column_halves

_DT, _DAQK = 0, 1


class Levels:
  """Gradients of this warpgroup's channels and tokens, as they go down."""

  def __init__(self, chunk, scores, dE_neg, dQg, dKd):
    self.chunk, self.s = chunk, chunk.s
    self._share_scores(scores)
    self.sums = gates.of_stored_keys(chunk, dE_neg, dQg, dKd)

  def run(self):
    """Computes the gradients and passes them to chunk.write, 16 tokens a time.

    The state of 16 tokens has d(-e), dq, dk and the flow, [channels, 16] each.
    """
    self.chunk = self.chunk.recomputed()
    state = self._of_chunk(*self.sums)
    self.chunk = self.chunk.recomputed()
    states = self._of_halves(*state)
    # Of blocks of 16 and below: one after the other, to save registers.
    self.chunk.meet()  # the memory is that of scores, X and Q
    if self.chunk.is_projected:
      gates.begin(self.chunk)
    for n, x in enumerate(states[1]):
      columns.keep(self._saved(n), blocks.in_rows(x))

    def body(n, state):
      chunk = self.chunk
      for level, half in enumerate(LEVELS):
        self.chunk = chunk.recomputed()
        state = self._level(n, level, half, *state)
      self.chunk = chunk.recomputed()
      self.chunk.write(n, *self._of_tokens(n, *state))
      self.chunk = chunk.recomputed()
      state = tuple(
        columns.kept(self._saved(m), (TILE, BLOCK)) for m in range(len(state))
      )
      self.chunk = chunk
      return state

    blocks.loop(2, body, tuple(map(blocks.in_rows, states[0])))

  def _saved(self, n):
    """Memory of this warpgroup for array n of a state."""
    at = (n * 2 * self.chunk.tiles + self.chunk.wg) * TILE
    return self.s["saved"].at[pl.ds(at * BLOCK, TILE * BLOCK)]

  def _keys(self, n):
    """-e, q and k of block n."""
    b, q, k = (self.chunk.load(name, self.chunk.block(n)) for name in "bqk")
    return -b * k, q, k

  def _decays(self, n):
    a = self.s["a"].at[self.chunk.channels, self.chunk.block(n)]
    return columns.Decays(plgpu.layout_cast(blocks.load(a), ROWS))

  def _share_scores(self, scores):
    """Stores d(-T) and dAqk for all warpgroups, and their diagonal blocks."""
    chunk, matrix = self.chunk, self.chunk.half
    for x, n in zip(scores, column_halves(chunk), strict=True):
      # Here, so q is not scaled.
      x = gates.of_stored_scores(chunk, x, matrix == _DAQK, n)

      @pl.when(matrix == _DAQK)
      def _(x=x, n=n):
        diagonals.store_diagonal(self.s["diagonal"], x, n)

      # The block of 32 above the diagonal is zero. The diagonal blocks of 16
      # are read from `diagonals` alone.
      r = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=ROWS)
      parts = blocks.split(jnp.where(r >= n * HALF, x, 0.0), self.s["q"].dtype)
      for low, part in enumerate(parts):
        rows = pl.ds((2 * matrix + low) * C, C)
        self.s["scores"].at[rows, pl.ds(n * HALF, HALF)][...] = part
      refs = [
        [self._masked(level, matrix, low) for low in range(2)]
        for level in range(len(LEVELS))
      ]
      diagonals.store(refs, parts, n)
    chunk.meet()

  def _masked(self, level, matrix, low, row=0, rows=C):
    """Diagonal blocks of 16 of a level, or rows of them."""
    at = (level * 4 + 2 * matrix + low) * C + row
    return self.s["diagonals"].at[pl.ds(at, rows)]

  def _score(self, matrix, low, row, column, width):
    """Block of d(-T) or dAqk below the diagonal."""
    at = pl.ds((2 * matrix + low) * C + row, width)
    ref = self.s["scores"].at[at, pl.ds(column, width)]
    return Operand(ref, BLOCK)

  def _of_chunk(self, de, dq, dk):
    """The level whose blocks are the chunk, across warpgroups.

    Returns:
      d(-e), dq and dk [channels, 32], the flow [channels, 16] of each 16
      tokens, and S_s of the first 16 and P_r of the last 16 within 32 tokens.
    """
    chunk, half = self.chunk, self.chunk.half
    other = 1 - half
    second = columns.iota(BLOCK) < jnp.where(half == 1, BLOCK, 0)
    kept, flow = [None, None], 0.0
    for n in range(2):
      block = slice(n * BLOCK, (n + 1) * BLOCK)
      decays = self._decays(n).climb(BLOCK)
      kept[n] = decays.prefix if n else decays.suffix
      D = jnp.where(second, decays.prefix, decays.suffix)
      # Over the other 16 tokens, if they are on the way to the middle.
      D *= chunk.total_if(half == n, 2 * half + 1 - n, BLOCK)
      e, q, k = self._keys(n)
      X, Q = D * jnp.where(second, e, k), D * q
      to_second = X * de[:, block] + Q * dq[:, block]
      # Summed at once, to save registers.
      flow += jnp.where(second, to_second, X * dk[:, block]).sum(axis=1)
      channels = pl.ds(half * chunk.K + chunk.tile * TILE, TILE)
      for name, x in (("X", X), ("Q", Q)):
        ref = self.s[name].at[channels, pl.ds(n * BLOCK, BLOCK)]
        ref[...] = x.astype(ref.dtype)
    o = plgpu.load(
      chunk.vector("totals", HALVES + other), layout=ROWS.reduce(1)
    )
    chunk.vector("sums", half)[...] = o * flow
    # The decay of the other half, for the rows on the far side of it.
    o = chunk.total_if(half == 1, HALVES)
    de, dq = de * o, dq * o
    dk = dk * chunk.total_if(half == 0, HALVES + 1)
    chunk.meet()
    self.chunk = chunk = chunk.recomputed()
    half, other = chunk.half, 1 - chunk.half
    # Of the whole chunk: gamma_C; a part for each of 16 columns.
    flow = chunk.load_vector("totals", HALVES, BLOCK)
    flow *= chunk.load_vector("totals", HALVES + 1, BLOCK)
    dgamma_C = (chunk.load_vector("dgamma_C", m, BLOCK) for m in range(2))
    flow = flow * sum(dgamma_C) + chunk.load_vector("sums", other, BLOCK)
    flow *= 1 / BLOCK
    channels = pl.ds(other * chunk.K + chunk.tile * TILE, TILE)
    X, Q = (Operand(self.s[name].at[channels], BLOCK) for name in "XQ")
    # Entries above the diagonal are zero: of these products, one half of the
    # warpgroups adds zeros to d(-e) and dq, the other to dk.
    here, there = half * HALF, other * HALF
    later, earlier = (
      [
        [self._score(m, low, row, column, HALF) for low in range(2)]
        for m in (_DT, _DAQK)
      ]
      for row, column in ((here, there), (there, here))
    )
    sums = dots(
      (de, [(X, x.T) for x in later[_DT]]),
      (dq, [(X, x.T) for x in later[_DAQK]]),
      (
        dk,
        [(X, x) for x in earlier[_DT]] + [(Q, x) for x in earlier[_DAQK]],
      ),
    )
    return *sums, flow, *kept

  def _of_halves(self, de, dq, dk, flow, S, P):
    """From blocks of 32 tokens to the states of two blocks of 16."""
    chunk = self.chunk
    first, last = slice(None, BLOCK), slice(BLOCK, None)
    T = [
      chunk.load_vector("totals", 2 * chunk.half + n, BLOCK) for n in range(2)
    ]
    x = S * chunk.load("k", chunk.block(0))
    e, q, _ = self._keys(1)
    y, z = P * e, P * q
    flows = [
      flow + T[0] * (y * de[:, last] + z * dq[:, last]),
      flow + T[1] * (x * dk[:, first]),
    ]
    at = chunk.half * HALF
    pairs = self._products(
      (x, y, z),
      lambda *which: self._score(*which, at + BLOCK, at, BLOCK),
    )
    sums = de[:, last] * T[0], dq[:, last] * T[0], dk[:, first] * T[1]
    de_last, dq_last, dk_first = dots(*zip(sums, pairs, strict=True))
    return (
      (de[:, first], dq[:, first], dk_first, flows[0]),
      (de_last, dq_last, dk[:, last], flows[1]),
    )

  def _level(self, n, level, half, de, dq, dk, flow):
    """Goes down one level of block n."""
    second = columns.is_second(BLOCK, half)
    decays = self._decays(n).climb(half)
    o = decays.other()
    D = jnp.where(second, decays.prefix, decays.suffix)
    e, q, k = self._keys(n)
    X, Q = D * jnp.where(second, e, k), D * q
    through = jnp.where(second, X * de + Q * dq, X * dk)
    flow += columns.neighbour(flow + o * through, half)
    row = self.chunk.half * HALF + n * BLOCK

    def score(*which):
      ref = self._masked(level, *which, row, BLOCK)
      return Operand(ref, BLOCK)

    pairs = self._products((X, X, Q), score)
    # Not into the accumulators: ptxas waits for every single product if results
    # of one are partly changed before they are the accumulator of another.
    zeros = [blocks.zeros(TILE, BLOCK)] * len(pairs)
    sums = dots(*zip(zeros, pairs, strict=True))
    to_second, to_first = jnp.where(second, o, 1.0), jnp.where(second, 1.0, o)
    factors = to_second, to_second, to_first
    state = zip((de, dq, dk), factors, sums, strict=True)
    return *(x * factor + y for x, factor, y in state), flow

  def _products(self, rows, score):
    """Products for d(-e), dq and dk, as arguments of dots.

    Args:
      rows: k_s S_s, -e_r P_r and q_r P_r [channels, 16].
      score: Function of the matrix and of high or low part (0 or 1).
    """
    dtype = self.s["q"].dtype
    x, y, z = ((v.astype(dtype),) for v in rows)
    if dtype == jnp.float16:  # results are rounded as finely as operands
      x = blocks.split(rows[0], dtype)
    dT, dAqk = (tuple(score(m, low) for low in range(2)) for m in (_DT, _DAQK))
    dT_T, dAqk_T = (tuple(part.T for part in m) for m in (dT, dAqk))
    return (
      blocks.split_pairs(x, dT_T),
      blocks.split_pairs(x, dAqk_T),
      blocks.split_pairs(y, dT) + blocks.split_pairs(z, dAqk),
    )

  def _of_tokens(self, n, de, dq, dk, flow):
    """q, k, and dq, dk, db and dg of block n."""
    chunk, rows = self.chunk, self.chunk.block(n)
    a = self._decays(n).prefix
    b, q, k = (chunk.load(name, rows) for name in "bqk")
    de, dq = de * a, dq * a
    dg = flow + q * dq - b * k * de
    diagonal = plgpu.load(self.s["diagonal"].at[rows], layout=ROWS.reduce(0))
    diagonal = blocks.of_columns(diagonal, (TILE, BLOCK))
    dq += diagonal * k
    dk += diagonal * q - b * de
    return q, k, dq, dk, -k * de, dg
