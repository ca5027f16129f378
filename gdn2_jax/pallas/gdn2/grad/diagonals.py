"""Diagonal blocks of 16 by 16 of d(-T) and dAqk, masked for every level.

Columns s of a block meet rows r > s at the level of the highest bit in which r
and s differ. Masks of a thread are one bit of its lane, the same for 16-bit
numbers of high and low parts. Half of the warps have blocks on the diagonal of
the 32 columns of a warpgroup, and the others none; plain Pallas cannot express
that a warp does nothing. The interpreter computes the same in jax.numpy.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from gdn2_jax.kernels import target
from gdn2_jax.pallas import inline
from gdn2_jax.pallas.blocks import ROWS, C
from gdn2_jax.pallas.gdn2.grad.columns import BLOCK, HALF, LEVELS


def store(refs, parts, n):
  """Stores the blocks of columns 32*n to 32*n + 31, for every level.

  Args:
    refs: [C, 16] of the high and of the low part for each of LEVELS, 16-bit, in
      tiles of 8 by 16. Rows 32*n to 32*n + 31 are written.
    parts: High and low part [C, 32], in the layout of wgmma results.
    n: 0 or 1, a scalar.
  """
  if target.is_interpreted():
    r, c = (lax.broadcasted_iota(jnp.int32, (C, BLOCK), d) for d in range(2))
    apart = (r ^ c) & (BLOCK - 1)
    for half, level in zip(LEVELS, refs, strict=True):
      own = (apart >= half) & (apart < 2 * half) & ((r & half) != 0)
      for x, ref in zip(parts, level, strict=True):
        x = jnp.where((r & BLOCK) != 0, x[:, BLOCK:], x[:, :BLOCK])
        x = jnp.where(own, x, jnp.zeros_like(x))
        x = lax.dynamic_slice_in_dim(x, n * HALF, HALF)
        ref.at[pl.ds(n * HALF, HALF)][...] = x
    return
  tiles = plgpu.RefType(
    (plgpu.TilingTransform((8, BLOCK)), plgpu.SwizzleTransform(2 * BLOCK))
  )

  @plgpu.inline_mgpu(
    arg_types=(inline.SCALAR, ROWS, ROWS, *[tiles] * (2 * len(LEVELS)))
  )
  def run(ctx, n, high, low, *refs):
    del ctx
    thread = arith.andi(utils.thread_idx(), _i32(127))
    warp = arith.shrui(thread, _i32(5))
    lane = arith.andi(thread, _i32(31))
    is_own = _equal(arith.shrui(warp, _i32(1)), n.registers.item())
    is_odd = _equal(arith.andi(warp, _i32(1)), _i32(1))
    with utils.when(is_own):
      parts = [_block(x, is_odd) for x in (high, low)]
      for level, half in enumerate(LEVELS):
        mask = _mask(lane, half)
        for part, bits in enumerate(parts):
          _store(refs[2 * level + part], _masked(bits, half, mask), high)
    return ()

  run(n, *parts, *(ref for level in refs for ref in level))


def _block(x, is_odd):
  """Pairs of 16-bit numbers of a warp's block, [tile of 8 columns, 8 rows]."""
  tiles = x.registers.reshape(4, 2)
  i32 = _i32(0).type
  out = np.empty((2, 2), object)
  for index in np.ndindex(out.shape):
    first, second = (
      utils.bitcast(tiles[2 * m + index[0], index[1]], i32) for m in range(2)
    )
    out[index] = arith.select(is_odd, second, first)
  return out


def _mask(lane, half):
  """Bits of a pair on the diagonal of tiles that belong to a level below 8."""
  # Bits 2, 3, 4 of the lane are bits 0, 1, 2 of the row, and its bits 0, 1 are
  # bits 1, 2 of the column; bit 0 of the column is the place in the pair.
  if half == BLOCK // 2:
    return None

  def differs(n):  # in bit n
    return arith.andi(
      arith.xori(_shifted(lane, n + 2), _shifted(lane, n - 1)), _i32(1)
    )

  row = arith.andi(_shifted(lane, {4: 4, 2: 3, 1: 2}[half]), _i32(1))
  if half == 4:
    own = arith.andi(row, differs(2))
  elif half == 2:
    own = arith.andi(arith.andi(row, differs(1)), _not(differs(2)))
  else:
    same = _not(arith.ori(differs(1), differs(2)))
    own = arith.andi(row, same)
  all_bits = arith.subi(_i32(0), own)
  return arith.andi(all_bits, _i32(0xFFFF)) if half == 1 else all_bits


def _masked(bits, half, mask):
  """Entries of a level in a block, the others zero."""
  out = np.full((2, 2), _i32(0), object)
  if half == BLOCK // 2:
    out[0, 1] = bits[0, 1]  # columns below 8, rows from 8
  else:
    for n in range(2):
      out[n, n] = arith.andi(bits[n, n], mask)
  return out


def _store(ref, bits, like):
  """Stores a warp's block; the rows of a warp are its own."""
  layout = fragmented_array.WGMMA_LAYOUT
  pair = like.registers.flat[0].type
  registers = np.empty(4, object)
  for n, x in enumerate(bits.flat):
    registers[n] = utils.bitcast(x, pair)
  array = fragmented_array.FragmentedArray(
    _registers=registers.reshape(layout.registers_shape((C, BLOCK))),
    _layout=layout,
    _is_signed=None,
  )
  array.store_tiled(ref, swizzle=2 * BLOCK)


def store_diagonal(ref, x, n):
  """Stores entries [32*n + c, c] of x [C, 32] in ref [C].

  Args:
    ref: float32, untiled; 32 numbers from 32*n are written.
    x: float32, in the layout of wgmma results.
    n: 0 or 1, a scalar.
  """
  if target.is_interpreted():
    rows = lax.dynamic_slice_in_dim(x, n * HALF, HALF)
    ref.at[pl.ds(n * HALF, HALF)][...] = jnp.diagonal(rows)
    return

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), inline.SCALAR, ROWS))
  def run(ctx, ref, n, x):
    del ctx
    thread = arith.andi(utils.thread_idx(), _i32(127))
    warp = arith.shrui(thread, _i32(5))
    of_eight = arith.andi(_shifted(thread, 2), _i32(7))
    pair = arith.andi(thread, _i32(3))
    is_own = arith.andi(
      _equal(arith.shrui(warp, _i32(1)), n.registers.item()),
      _equal(arith.shrui(of_eight, _i32(1)), pair),
    )
    is_odd_row = _equal(arith.andi(of_eight, _i32(1)), _i32(1))
    is_odd = _equal(arith.andi(warp, _i32(1)), _i32(1))
    tiles = x.registers.reshape(4, 2)
    f32 = ir.F32Type.get()
    row = arith.addi(arith.muli(warp, _i32(16)), of_eight)
    base = utils.getelementptr(utils.memref_ptr(ref), [row], f32)
    with utils.when(is_own):
      for half in range(2):
        value = arith.select(is_odd, tiles[2 + half, half], tiles[half, half])
        one, two = (
          vector.extract(value, dynamic_position=[], static_position=[m])
          for m in range(2)
        )
        value = arith.select(is_odd_row, two, one)
        llvm.store(value, utils.getelementptr(base, [8 * half], f32))
    return ()

  run(ref, n, x)


def _shifted(x, n):
  return arith.shrui(x, _i32(n)) if n else x


def _not(bit):
  return arith.xori(bit, _i32(1))


def _equal(x, y):
  return arith.cmpi(arith.CmpIPredicate.eq, x, y)


def _i32(x):
  return utils.c(x, ir.IntegerType.get_signless(32))
