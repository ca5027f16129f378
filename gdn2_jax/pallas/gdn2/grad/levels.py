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
from gdn2_jax.pallas.gdn2.grad import columns
from gdn2_jax.pallas.gdn2.grad.columns import BLOCK, HALF, LEVELS
from gdn2_jax.pallas.gdn2.grad.values import column_halves

_DT, _DAQK = 0, 1


class Levels:
  """Gradients of this warpgroup's channels and tokens, as they go down.

  Attributes:
    de: d(-e), two arrays [channels, 16].
    dq: likewise, of q times scale.
    dk: likewise.
    flow: likewise, d(log-decay), of which all tokens of a block hold a part.
  """

  def __init__(self, chunk, scores, dE_neg, dQg, dKd):
    self.chunk, self.s = chunk, chunk.s
    self._share_scores(scores)
    parts = (slice(None, BLOCK), slice(BLOCK, None))
    self.de, self.dq, self.dk = (
      [x[:, part] for part in parts] for x in (dE_neg, dQg, dKd)
    )
    self.flow = [None, None]

  def run(self):
    """Returns dq, dk, db and dg, each two arrays [channels, 16]."""
    self._of_halves()
    results = []
    for n in range(2):
      self._of_block(n)
      results.append(self._of_tokens(n))
    return tuple(zip(*results, strict=True))

  def _rows(self, n):
    """Tokens of block n."""
    return self.chunk.block(n)

  def _keys(self, n):
    """-e, q and k of block n."""
    b, q, k = (self.chunk.load(name, self._rows(n)) for name in "bqk")
    return -b * k, q, k

  def _decays(self, n):
    a = self.s["a"].at[self.chunk.channels, self._rows(n)]
    return columns.Decays(plgpu.layout_cast(blocks.load(a), ROWS))

  def _share_scores(self, scores):
    """Stores d(-T) and dAqk for all warpgroups, and their diagonal blocks."""
    chunk, matrix = self.chunk, self.chunk.half
    for x, n in zip(scores, column_halves(chunk), strict=True):
      r, c = (
        plgpu.broadcasted_iota(jnp.int32, x.shape, axis, layout=ROWS)
        for axis in range(2)
      )
      c += n * HALF
      diagonal = jnp.where(r == c, x, 0.0).sum(axis=1)

      @pl.when(matrix == _DAQK)
      def _(diagonal=diagonal, n=n):
        self.s["diagonal"].at[n][...] = diagonal

      x = jnp.where(r > c, x, 0.0)
      refs = [
        self.s["scores"].at[
          pl.ds((2 * matrix + low) * C, C), pl.ds(n * HALF, HALF)
        ]
        for low in range(2)
      ]
      blocks.store_split(x, *refs)
      self._store_diagonal_blocks(x, matrix, n)
    chunk.meet()

  def _store_diagonal_blocks(self, x, matrix, n):
    """Stores the diagonal blocks of 32 columns, masked for each level."""
    r, c = (
      plgpu.broadcasted_iota(jnp.int32, (C, BLOCK), axis, layout=ROWS)
      for axis in range(2)
    )
    # Rows of other blocks hold what is never read.
    x = jnp.where((r & BLOCK) != 0, x[:, BLOCK:], x[:, :BLOCK])
    apart = (r ^ c) & (BLOCK - 1)
    for level, half in enumerate(LEVELS):
      own = (apart >= half) & (apart < 2 * half)
      refs = [self._masked(level, matrix, low, n) for low in range(2)]
      blocks.store_split(jnp.where(own, x, 0.0), *refs)

  def _masked(self, level, matrix, low, n, row=0, rows=C):
    """Diagonal blocks of 32 columns of a level, or rows of them."""
    at = ((level * 4 + 2 * matrix + low) * 2 + n) * C + row
    return self.s["diagonals"].at[pl.ds(at, rows)]

  def _score(self, matrix, low, row, rows, column, width):
    """Block of d(-T) or dAqk below the diagonal."""
    at = pl.ds((2 * matrix + low) * C + row, rows)
    return self.s["scores"].at[at, pl.ds(column, width)]

  def _of_halves(self):
    """From the whole chunk to blocks of 16 tokens."""
    chunk, dtype = self.chunk, self.s["q"].dtype
    decays = [self._decays(n).climb(BLOCK) for n in range(2)]
    P, S, T = (
      [getattr(d, name) for d in decays]
      for name in ("prefix", "suffix", "total")
    )
    self._exchange_halves(P, S, T)
    # Blocks of 32 tokens: block 0 is the first half.
    low = self._keys(0)
    x = S[0] * low[2]
    up = self._keys(1)
    y, z = P[1] * up[0], P[1] * up[1]
    flow = self.flow[0] + self.flow[1]
    self.flow = [
      flow + T[0] * (y * self.de[1] + z * self.dq[1]),
      flow + T[1] * (x * self.dk[0]),
    ]
    self.de[1] *= T[0]
    self.dq[1] *= T[0]
    self.dk[0] *= T[1]
    x, y, z = (v.astype(dtype) for v in (x, y, z))
    first = chunk.half * HALF

    def score(matrix, part):
      return self._score(matrix, part, first + BLOCK, BLOCK, first, BLOCK)

    pairs = [], [], []
    for part in range(2):
      dT, dAqk = score(_DT, part), score(_DAQK, part)
      pairs[0].append((x, blocks.transposed(dT)))
      pairs[1].append((x, blocks.transposed(dAqk)))
      pairs[2].extend(((y, dT), (z, dAqk)))
    sums = (self.de[1], self.dq[1], self.dk[0])
    sums = columns.dots(*zip(sums, pairs, strict=True))
    self.de[1], self.dq[1], self.dk[0] = map(blocks.in_rows, sums)

  def _exchange_halves(self, P, S, T):
    """The level whose blocks are the chunk, across warpgroups."""
    chunk, half = self.chunk, self.chunk.half
    other = 1 - half
    column = columns.iota(BLOCK)
    second = column < jnp.where(half == 1, BLOCK, 0)
    P = [P[0], P[1] * T[0]]
    S = [S[0] * T[1], S[1]]
    o = chunk.load_vector("totals", other, BLOCK)
    flow = jnp.zeros_like(o)
    for n in range(2):
      e, q, k = self._keys(n)
      D = jnp.where(second, P[n], S[n])
      X, Q = D * jnp.where(second, e, k), D * q
      flow += jnp.where(second, X * self.de[n] + Q * self.dq[n], X * self.dk[n])
      channels = pl.ds(half * chunk.K + chunk.tile * TILE, TILE)
      tokens = pl.ds(n * BLOCK, BLOCK)
      for name, x in (("X", X), ("Q", Q)):
        ref = self.s[name].at[channels, tokens]
        ref[...] = x.astype(ref.dtype)
    chunk.vector("sums", half)[...] = (o * flow).sum(axis=1)
    to_second = chunk.load_vector("totals", jnp.where(half == 1, 0, 2), BLOCK)
    to_first = chunk.load_vector("totals", jnp.where(half == 1, 2, 1), BLOCK)
    for n in range(2):
      self.de[n] *= to_second
      self.dq[n] *= to_second
      self.dk[n] *= to_first
    chunk.meet()
    # Of the whole chunk: gamma_C; a part for each of 32 columns.
    flow = chunk.load_vector("totals", 0, BLOCK)
    flow *= chunk.load_vector("totals", 1, BLOCK)
    dgamma_C = (chunk.load_vector("dgamma_C", m, BLOCK) for m in range(2))
    flow = flow * sum(dgamma_C) + chunk.load_vector("sums", other, BLOCK)
    self.flow = [flow * (1 / HALF)] * 2
    channels = pl.ds(other * chunk.K + chunk.tile * TILE, TILE)
    X, Q = (self.s[name].at[channels] for name in ("X", "Q"))
    # Entries above the diagonal are zero: of these products, one half of the
    # warpgroups adds zeros to d(-e) and dq, the other to dk.
    sums = []
    for n in range(2):
      at = half * HALF + n * BLOCK
      later, earlier = (
        [
          [self._score(m, low, row, rows, column, width) for low in range(2)]
          for m in (_DT, _DAQK)
        ]
        for row, rows, column, width in (
          (at, BLOCK, other * HALF, HALF),
          (other * HALF, HALF, at, BLOCK),
        )
      )
      for x, matrix in ((self.de[n], _DT), (self.dq[n], _DAQK)):
        sums.append((x, [(X, blocks.transposed(ref)) for ref in later[matrix]]))
      pairs = [
        (y, ref) for y, m in ((X, _DT), (Q, _DAQK)) for ref in earlier[m]
      ]
      sums.append((self.dk[n], pairs))
    sums = list(map(blocks.in_rows, columns.dots(*sums)))
    self.de, self.dq, self.dk = sums[::3], sums[1::3], sums[2::3]

  def _of_block(self, n):
    """From blocks of 16 tokens to single tokens."""
    decays = self._decays(n)
    D, others = {}, {}
    for half in LEVELS[::-1]:
      decays.climb(half)
      second = columns.is_second(BLOCK, half)
      D[half] = jnp.where(second, decays.prefix, decays.suffix)
      others[half] = decays.other()
    for level, half in enumerate(LEVELS):
      self._level(n, level, half, D[half], others[half])

  def _level(self, n, level, half, D, o):
    """Goes down one level; D are P_r and S_s."""
    dtype = self.s["q"].dtype
    second = columns.is_second(BLOCK, half)
    e, q, k = self._keys(n)
    X, Q = D * jnp.where(second, e, k), D * q
    flow = jnp.where(second, X * self.de[n] + Q * self.dq[n], X * self.dk[n])
    flow = self.flow[n] + o * flow
    self.flow[n] = self.flow[n] + columns.neighbour(flow, half)
    de, dq = (jnp.where(second, x[n] * o, x[n]) for x in (self.de, self.dq))
    dk = jnp.where(second, self.dk[n], self.dk[n] * o)
    X, Q = X.astype(dtype), Q.astype(dtype)
    row = self.chunk.half * HALF + n * BLOCK

    def score(matrix, part):
      return self._masked(level, matrix, part, self.chunk.half, row, BLOCK)

    pairs = [], [], []
    for part in range(2):
      dT, dAqk = score(_DT, part), score(_DAQK, part)
      pairs[0].append((X, blocks.transposed(dT)))
      pairs[1].append((X, blocks.transposed(dAqk)))
      pairs[2].extend(((X, dT), (Q, dAqk)))
    sums = columns.dots(*zip((de, dq, dk), pairs, strict=True))
    self.de[n], self.dq[n], self.dk[n] = map(blocks.in_rows, sums)

  def _of_tokens(self, n):
    """dq, dk, db and dg of block n."""
    chunk, rows = self.chunk, self._rows(n)
    a = self._decays(n).prefix
    b, q, k = (chunk.load(name, rows) for name in "bqk")
    de, dq, dk = self.de[n] * a, self.dq[n] * a, self.dk[n]
    dg = self.flow[n] + q * dq - b * k * de
    diagonal = sum(
      plgpu.load(self.s["diagonal"].at[m, rows], layout=ROWS.reduce(0))
      for m in range(2)
    )
    diagonal = blocks.of_columns(diagonal, (TILE, BLOCK))
    dq = (dq + diagonal * k) * chunk.scale
    dk += diagonal * q - b * de
    return dq, dk, -k * de, dg
