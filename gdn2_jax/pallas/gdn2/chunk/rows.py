"""Row stage: decays within a chunk as products down its rows.

Legend: r, s rows (tokens) of a chunk of C = 64; a = exp(g) the decay of one
token and channel; e = b*k. At level n of the tree (README.md section 2) a
block of 2*half rows, half = 2^n, is cut at its middle, before its row m:

  P_r = a_m * ... * a_r            r in the second half
  S_s = a_(s+1) * ... * a_(m-1)    s in the first half
  T_rs = (e_r*P_r) . (k_s*S_s)     Aqk_rs = (q_r*P_r) . (k_s*S_s)

A warpgroup has R = 16 rows, a thread one channel of them. Running products
e*P, q*P and k*S stay in its registers, and going up a level is a multiplication
of each by the decay of the block's other half:

  e_r*P_r, q_r*P_r *= decay of all of the first half     r in the second half
  k_s*S_s          *= decay of all of the second half    s in the first half

so a level needs neither sums, nor masks, nor exp. After the last level they are
E, Qg and Kd. All factors are at most 1, and row r has only factors of the past
in e*P and q*P: nothing overflows, and causality is exact.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gdn2_jax.kernels import target
from gdn2_jax.pallas import blocks, inline
from gdn2_jax.pallas.blocks import C

R = 16  # rows of a warpgroup
WARPGROUPS = C // R
WITHIN = 4  # levels within a warpgroup's rows: half = 1, 2, 4, 8
OPERAND_COLUMNS = 32  # of a tile of an operand of scores


def load_row(ref: Any, r: Any) -> Any:
  """Loads row r of an untiled buffer [C, K] as float32, a channel a thread."""
  K = ref.shape[-1]
  layout = inline.channel_layout(K)
  x = plgpu.load(ref.at[r], layout=layout, optimized=False)
  return x.astype(jnp.float32)


def load_rows(ref: Any, which: Iterable[int]) -> dict[int, Any]:
  """Loads rows of an untiled buffer [R, K], as `load_row` does each."""
  if target.is_interpreted():  # where every access of memory takes long
    block = ref[...].astype(jnp.float32)
    return {r: block[r] for r in which}
  return {r: load_row(ref, r) for r in which}


def store_rows(ref: Any, rows: Sequence[Any]) -> None:
  """Stores all rows of an untiled buffer [R, K], as `store_row` does each."""
  if target.is_interpreted():
    ref[...] = jnp.stack(rows).astype(ref.dtype)
    return
  for r, x in enumerate(rows):
    store_row(ref, r, x)


def store_row(ref: Any, r: Any, x: Any) -> None:
  """Stores a row in an untiled buffer [C, K], rounded to its dtype."""
  blocks.store_untiled(ref.at[r], x.astype(ref.dtype))


class Decays(NamedTuple):
  """Decays of whole blocks that a warpgroup needs for its next level.

  Attributes:
    within: decay [K] of every block of half rows among the warpgroup's 16.
    outer: decay [K] of rows of other warpgroups, as a factor on its e*P and
      q*P and as one on its k*S; () below level 16.
  """

  within: tuple[Any, ...]
  outer: tuple[Any, ...] = ()

  def up(self, n: int, totals: Any, wg: Any) -> "Decays":
    """Decays for level n + 1.

    totals [WARPGROUPS + 1, K] is shared memory for the decays of 16 rows of
    every warpgroup and a row of ones. Level 8 stores, and a barrier of all
    warpgroups comes before level 16.
    """
    if n < WITHIN:
      pairs = zip(self.within[::2], self.within[1::2], strict=True)
      within = tuple(x * y for x, y in pairs)
      if n == WITHIN - 1:
        store_row(totals, wg, within[0])
      return Decays(within)
    step = 2**n // R  # warpgroups of half a block
    is_second = (wg & step) != 0
    other = wg & -step ^ step  # first warpgroup of the block's other half
    ones = WARPGROUPS
    before = jnp.where(is_second, other, ones)
    after = jnp.where(is_second, ones, other)

    def total(first):
      x = load_row(totals, first)
      if step == 1:
        return x
      return x * load_row(totals, jnp.where(first == ones, ones, first + 1))

    factors = total(before), total(after)
    if self.outer:
      factors = tuple(x * y for x, y in zip(self.outer, factors, strict=True))
    return Decays(self.within, factors)


class Values(NamedTuple):
  """Running products of a warpgroup's rows; None: not loaded yet.

  Attributes:
    e: -e*P of every row. With minus e, T comes out as -T and Y as -Y, which
      the inverse and the caller want; a product's sign is never changed.
    q: q*P of every row.
    k: k*S of every row.
    P: P of rows whose e and q are not loaded yet.
    decays: decays of whole blocks.
  """

  e: tuple[Any, ...]
  q: tuple[Any, ...]
  k: tuple[Any, ...]
  P: dict[int, Any]
  decays: Decays


class Rows:
  """A warpgroup's 16 rows on their way up the tree.

  One buffer X [K, C] of a level has e*P of second halves and k*S of first ones,
  because a row is on one side of the level's cut; Q [K, C] has q*P of second
  halves. So -T is X^T X where the cut separates r and s, and Aqk is Q^T X; all
  other entries of these products are never looked at. X and Q are transposed,
  as a thread has several rows of one channel.

  Where s is the last row of a first half, S_s = 1 and the place of q_s in Q is
  free: there Q has q_s, and the product has q_s . k_s, the diagonal of Aqk.
  """

  def __init__(
    self,
    s: Any,
    wg: Any,
    *,
    with_T: bool,
    g: Sequence[Any] | None = None,
    gate: Callable[[Any], Any] | None = None,
  ):
    """Loads the rows.

    Args:
      s: Buffers by name.
      wg: The warpgroup.
      with_T: Without T, X only has k*S.
      g: Its rows; by default they are loaded, too.
      gate: Makes a row of the erase gate of one of b; default: b is the gate.
    """
    self.s, self.wg, self.first, self.with_T = s, wg, wg * R, with_T
    self.gate = gate
    if g is None:
      g = list(self._load("g", range(R)).values())
    decays = [jnp.exp(x) for x in g]
    # gamma_C is exp of a sum: the state passes through many chunks.
    store_row(s["g_sums"], wg, _sum(g))
    k = list(self._load("k", range(R)).values())

    @pl.when(wg == 0)
    def _():
      store_row(s["totals"], WARPGROUPS, _full(k[0].shape, 1.0))

    # Row 63 is in no first half. One warpgroup alone sums over channels: the
    # scratch memory of such a sum is the same for all of them.
    @pl.when(wg == WARPGROUPS - 1)
    def _():
      last = jnp.sum(load_row(self._rows("q"), R - 1) * k[-1])
      store_row(s["last_Aqk"], 0, _full(k[0].shape, last))

    # Rows that the first levels do not store are loaded later, which saves ten
    # registers: e*P and q*P of rows 0, 4, 8, 12, k*S of rows 3, 7, 11, 15.
    unset = (None,) * R
    k = [None if r % 4 == 3 else x for r, x in enumerate(k)]
    P = dict(enumerate(decays))
    self.values = Values(unset, unset, tuple(k), P, Decays(tuple(decays)))
    self._load_missing([r for r in range(R) if r % 4], [])

  def _rows(self, name):
    # Rows of this view are at constant distances, so that one register has the
    # address of them all. Of self.first + r the compiler keeps sixteen.
    return self.s[name].at[pl.ds(self.first, R)]

  def _load(self, name, which):
    return load_rows(self._rows(name), which)

  def _load_for(self, n):
    """Loads rows that level n stores and no level before it."""
    every = n == WITHIN
    self._load_missing(
      [r for r in range(R) if every or r & 2**n],
      [r for r in range(R) if every or not r & 2**n],
    )

  def _load_missing(self, second, first):
    """Loads e and q of second halves and k of first ones, if not there yet."""
    e, q, k = (list(x) for x in self.values[:3])
    P = dict(self.values.P)
    second = [r for r in second if e[r] is None]
    first = [r for r in first if k[r] is None]
    if second:
      of_k, of_q, of_b = (self._load(name, second) for name in "kqb")
      if self.gate is not None:
        of_b = {r: self.gate(x) for r, x in of_b.items()}
      for r in second:
        decay = P.pop(r)
        e[r], q[r] = -of_b[r] * of_k[r] * decay, of_q[r] * decay
    if first:
      for r, x in self._load("k", first).items():
        k[r] = x
    self.values = self.values._replace(e=tuple(e), q=tuple(q), k=tuple(k), P=P)

  def store_level(self, n: int) -> None:
    """Stores the columns of X and Q of level n that these rows are."""
    half = 2**n
    self._load_for(n)
    e, q, k, _, decays = self.values
    if n < WITHIN:
      second = [(r & half) != 0 for r in range(R)]
      last = self._load("q", range(half - 1, R, 2 * half))  # of first halves
      # Where Q is not read it gets what is at hand.
      Q = [last[r] if r in last else q[r | half] for r in range(R)]
      # Without T the columns of X with e*P are not read either.
      self._store(n, "X", [e[r] if second[r] else k[r] for r in range(R)])
      self._store(n, "Q", Q)
      return
    # Blocks of 16 rows and more: the warpgroup is in one half as a whole.
    is_second = (self.wg & (half // R)) != 0
    for_e, for_k = decays.outer or (None, None)

    def times(rows, factor):
      return rows if factor is None else [x * factor for x in rows]

    @pl.when(is_second)
    def _():
      if self.with_T:
        self._store(n, "X", times(e, for_e))
      self._store(n, "Q", times(q, for_e))

    @pl.when(jnp.logical_not(is_second))
    def _():
      self._store(n, "X", times(k, for_k))
      # Its last row is the last of a first half at one of both levels.
      last = load_row(self._rows("q"), R - 1)
      self._store(n, "Q", [*q[R // 2 : -1], last], R // 2)

  def _store(self, n, name, rows, skipped=0):
    above = ("X", "Q").index(name) * self.s["q"].shape[-1]
    first = self.first + skipped
    ref = self.s["XQ"][n % 2]
    inline.store_transposed(ref, above, first, rows, OPERAND_COLUMNS)

  def up(self, n: int) -> None:
    """Goes from blocks of 2^n rows to blocks of 2^(n + 1)."""
    half = 2**n
    e, q, k, P, decays = self.values
    if n < WITHIN:
      e, q, k = list(e), list(q), list(k)
      for r in range(R):
        other = decays.within[r // half ^ 1]
        if r & half:
          e[r] *= other
          q[r] *= other
        else:
          k[r] *= other
      e, q, k = tuple(e), tuple(q), tuple(k)
    decays = decays.up(n, self.s["totals"], self.wg)
    self.values = Values(e, q, k, P, decays)

  def store_results(self, scale: float) -> None:
    """Stores E for wgmma, and Qg and Kd in the place of q and k."""
    e, q, k, _, decays = self.values
    for_e, for_k = decays.outer
    for_q = for_e * scale
    self._store_E([x * for_e for x in e])
    store_rows(self._rows("q"), [x * for_q for x in q])
    store_rows(self._rows("k"), [x * for_k for x in k])

  def undo_scaling(self) -> None:
    """Takes the powers of two of inputs.scale_to_float16 out of the results.

    A thread changes what it has stored itself, so there is no barrier.
    """
    e, _, _, _, decays = self.values
    for_e, _ = decays.outer
    undo = [self.s["undo"].at[n] for n in range(3)]
    self._store_E(
      [x * for_e * undo[0][self.first + r] for r, x in enumerate(e)]
    )

    def row(r, _):
      for name, factor in (("q", undo[1]), ("k", undo[2])):
        x = load_row(self._rows(name), r)
        store_row(self._rows(name), r, x * factor[self.first + r])
      return jnp.int32(0)

    blocks.loop(R, row, jnp.int32(0))

  def _store_E(self, e):
    inline.store_transposed(self.s["E"], 0, self.first, e, OPERAND_COLUMNS)


def _full(shape, value):
  x = jnp.full(shape, value, jnp.float32)
  return plgpu.layout_cast(x, inline.channel_layout(shape[0]))


def _sum(terms):
  total, *rest = terms
  for x in rest:
    total += x
  return total
