"""T and Aqk from the levels' products: which entry comes from which level.

Four warpgroups compute [C, 32] each, columns 0 to 31 or 32 to 63, of -T or of
Aqk. With A given -T is not needed, and each has half the channels of Aqk. Every
level's product overwrites entries of the levels before it, in a way that in the
end each entry is that of its own level. Legend: rows.py.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gdn2_jax.kernels import target
from gdn2_jax.pallas import blocks, inline
from gdn2_jax.pallas.blocks import C
from gdn2_jax.pallas.gdn2.chunk.rows import OPERAND_COLUMNS

COLUMNS = OPERAND_COLUMNS  # that a warpgroup computes
LAST = blocks.LEVELS - 1  # it only has entries in columns 0 to 31
_TILE = 8  # columns of a tile within which a condition is evaluated


def opaque_zero(kinds: Any) -> Any:
  """Zero that LLVM cannot know: kinds are below 256."""
  return lax.shift_right_logical(kinds[0], jnp.int32(8))


class Part(NamedTuple):
  """What a warpgroup computes.

  Attributes:
    index: with T, 0 for -T and 1 for Aqk; without, half of the channels of Aqk.
    columns: first of its 32 columns.
    with_T: True if T is computed.
  """

  index: Any
  columns: Any
  with_T: bool


def part_of(wg: Any, *, with_T: bool) -> Part:
  """The part of a warpgroup."""
  return Part(wg >> 1, (wg & 1) * COLUMNS, with_T)


def operands(XQ: Any, part: Part, zero: Any) -> Any:
  """Operands of a level: X^T or Q^T, and columns of X; X above Q in XQ.

  LLVM keeps descriptors of a level for the next one in the same buffer, in 64
  registers, unless they depend on an opaque zero. Call this before a barrier:
  descriptors take up to 300 cycles.
  """
  K = XQ.shape[0] // 2
  columns = pl.ds(part.columns, COLUMNS)
  index = part.index + zero
  if part.with_T:
    a, b = pl.ds(index * K, K), pl.ds(zero * K, K)
  else:
    a, b = pl.ds(K + index * (K // 2), K // 2), pl.ds(index * (K // 2), K // 2)
  return XQ.at[a].transpose((1, 0)), XQ.at[b, columns]


def product(a: Any, b: Any, meanwhile: Any) -> tuple[Any, Any]:
  """a @ b [C, 32], and the result of `meanwhile()`, run beside tensor cores.

  The interpreter does not check what wgmma reads: it gets ordinary reads.
  """
  if target.is_interpreted():
    result = jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)
    return result, meanwhile()

  def run(acc):
    plgpu.wgmma(acc, a, b)
    beside = meanwhile()
    return acc[...], beside

  return pl.run_scoped(run, plgpu.ACC((C, COLUMNS), jnp.float32))


def select(n: int, new: Any, old: Any, wg: Any) -> list[Any]:
  """Entries after level n, in tiles of 8 columns: of its product, or of old."""
  new = [new[:, first : first + _TILE] for first in range(0, COLUMNS, _TILE)]
  if n == 0:
    return new
  first = (wg & 1) * (COLUMNS // _TILE)
  return [
    jnp.where(_is_taken(n, first + j), *x)
    for j, x in enumerate(zip(new, old, strict=True))
  ]


def _is_taken(n, tile):
  """Mask [C, 8], True where level n overwrites a tile of columns.

  The last level that overwrites an entry [r, s] must be its own, half <= r ^ s
  < 2 * half; above the diagonal anything may come. A thread shall have few
  different conditions, because the compiler keeps them all: below 8 rows it is
  that of the place in a tile of 8 by 8 (tiles beside the diagonal are
  overwritten later), from there on that of the tile.

  The diagonal of Aqk is taken at the level where s is the last row of a first
  half (rows.Rows). half is then the lowest zero bit of s; row 63 has none and
  is done apart. The diagonal of T is zeroed in the end.
  """
  r, c = (
    plgpu.broadcasted_iota(jnp.int32, (C, _TILE), n, layout=blocks.ROWS)
    for n in (0, 1)
  )
  half, row = 2**n, r & 7
  if half < _TILE:
    zero_bit = ~c & (c + 1) & 7  # 0: none below 8, so it is a later level
    diagonal = (row == c) & ((zero_bit >= half) | (zero_bit == 0))
    return ((row ^ c) >= half) | diagonal
  half //= _TILE
  row_tile = r >> 3
  diagonal = (row_tile == tile) & ((row & c) == 7)
  # A scalar: the tile's last column is the last of a first half.
  last = jnp.where(tile & (2 * half - 1) == half - 1, 0, C)
  return ((row_tile ^ tile) >= half) | (diagonal & (row_tile + last < C))


def store(s: Any, part: Part, scores: Any, scale: float) -> None:
  """Stores 32 columns of -T or scale * Aqk, with zeros above the diagonal.

  With A given it stores the sum over half the channels in s["parts"], of which
  `add_parts` makes Aqk.
  """
  here = pl.ds(part.columns, COLUMNS)
  if not part.with_T:
    s["parts"].at[pl.ds(part.index * C, C), here][...] = scores
    return
  r, c = _rows_and_columns(part)

  @pl.when(part.index == 0)
  def _():
    x = jnp.where(r > c, _unscaled(s, part, scores, 0), 0.0)
    s["T"].at[:, here][...] = x

  @pl.when(part.index == 1)
  def _():
    _store_Aqk(s, part, scores, scale)


def add_parts(s: Any, part: Part, scale: float) -> None:
  """Stores 32 columns of scale * Aqk, in the warpgroups with part.index 0."""
  here = pl.ds(part.columns, COLUMNS)
  one, two = (blocks.load(s["parts"].at[pl.ds(n * C, C), here]) for n in (0, 1))
  _store_Aqk(s, part, one + two, scale)


def _store_Aqk(s, part, scores, scale):
  r, c = _rows_and_columns(part)
  x = jnp.where((r & c) == C - 1, s["last_Aqk"][0, 0], scores)
  x = jnp.where(r >= c, _unscaled(s, part, x * scale, 1), 0.0)
  here = pl.ds(part.columns, COLUMNS)
  s["Aqk"].at[:, here][...] = x.astype(s["Aqk"].dtype)


def _rows_and_columns(part):
  r, c = (
    plgpu.broadcasted_iota(jnp.int32, (C, COLUMNS), n, layout=blocks.ROWS)
    for n in (0, 1)
  )
  return r, c + part.columns


def _unscaled(s, part, x, n):
  """Without the factors on rows n (0: e, 1: q) and on columns k."""
  if "undo" not in s:
    return x
  row, column = s["undo"].at[n], s["undo"].at[2, pl.ds(part.columns, COLUMNS)]
  row = plgpu.load(row, layout=blocks.ROWS.reduce(1), optimized=False)
  column = plgpu.load(column, layout=blocks.ROWS.reduce(0), optimized=False)
  return x * blocks.of_rows(row, x.shape) * blocks.of_columns(column, x.shape)


def join(tiles: list[Any]) -> Any:
  """Tiles of columns as one array [C, 32]."""
  return inline.join(tiles)
