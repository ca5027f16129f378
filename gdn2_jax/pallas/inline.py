"""Device code that Pallas cannot express, for the Warpgroup lowering.

Each function runs in one warpgroup, which is 128 threads. The interpreter has
no plgpu.inline_mgpu and runs the same function in jax.numpy. Tests execute the
device code on simulated threads and compare it with that.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxlib.mlir.dialects import math as math_dialect

from gdn2_jax.kernels import target

_THREADS = 128
SCALAR = plgpu.Layout.WG_STRIDED((_THREADS,), vec_size=1)  # any will do


def channel_layout(K: int) -> Any:
  """Layout of an array [K], K = 64 or 128: thread n holds channel n % K."""
  if K == _THREADS:
    return plgpu.Layout.WG_STRIDED((K,), vec_size=1)
  # Two warps times 32 lanes; the other two warps hold the same once more.
  return plgpu.Layout.TILED(
    fa.Tiling(((K,), (32,), (1,))),
    warp_dims=(fa.Replicated(2), -3),
    lane_dims=(-2,),
    vector_dim=-1,
  )


def declare_untiled(*refs: Any) -> None:
  """Tells the compiler that shared memory has no tiles.

  Nothing runs. Without this, layout inference tries every tiling for buffers
  that are read in layouts of tiles, which takes most of the compile time.
  """
  if target.is_interpreted():
    return

  @plgpu.inline_mgpu(arg_types=tuple(plgpu.RefType() for _ in refs))
  def run(ctx, *refs):
    del ctx, refs
    return ()

  run(*refs)


def sync_warps() -> None:
  """Barrier of the four warps of a warpgroup, without a fence.

  What a wgmma reads from shared memory may be overwritten after it: a warp that
  has waited for its own part of a product knows nothing of the other parts.
  """
  if target.is_interpreted():
    return

  @plgpu.inline_mgpu()
  def run(ctx):
    del ctx
    utils.warpgroup_barrier()
    return ()

  run()


def store_transposed(
  ref: Any, above: int, first: Any, rows: Sequence[Any], columns: int
) -> None:
  """Stores rows as columns: ref[above + n, first + m] = rows[m][n].

  A thread stores 8 rows of its channel as 16 bytes, without bank conflicts.

  Args:
    ref: [., C] of a 16-bit dtype in tiles of 8 by `columns`, swizzled over a
      whole row of a tile.
    above: First row of ref, a multiple of 8.
    first: First column, a scalar and a multiple of 8.
    rows: Arrays [K], float32, in channel_layout(K); a multiple of 8 of them.
    columns: Columns of a tile.
  """
  (K,) = rows[0].shape
  if target.is_interpreted():
    tile = jnp.stack([x.astype(ref.dtype) for x in rows], axis=1)
    block = ref.at[pl.ds(above, K), pl.ds(first, len(rows))]
    block[...] = tile
    return
  swizzle = 2 * columns
  transforms = (
    plgpu.TilingTransform((8, columns)),
    plgpu.SwizzleTransform(swizzle),
  )
  layout = channel_layout(K)

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(transforms), SCALAR, *([layout] * len(rows)))
  )
  def run(ctx, ref, first, *rows):
    del ctx
    channel = arith.remui(utils.thread_idx(), _i32(K))
    first = first.registers.item()
    kind = ir.MemRefType(ref.type)
    shape, (strides, _) = kind.shape, kind.get_strides_and_offset()
    assert shape[2:] == [8, columns], (
      shape
    )  # [rows / 8, C / columns, 8, columns]
    row_of_tiles, tile = (2 * stride for stride in strides[:2])  # bytes
    row = arith.andi(channel, _i32(7))
    row_offset = arith.muli(row, _i32(swizzle))
    offset = arith.addi(
      arith.muli(arith.shrui(channel, _i32(3)), _i32(row_of_tiles)), row_offset
    )
    # Swizzling permutes the 16-byte pieces of a row by address bits 7 and up.
    pieces = _i32(swizzle // 16 - 1)
    permutation = arith.andi(arith.shrui(row_offset, _i32(7)), pieces)
    base = utils.getelementptr(
      utils.memref_ptr(ref), [above // 8 * row_of_tiles], _byte()
    )
    for n in range(0, len(rows), 8):
      column = arith.addi(first, _i32(n))
      tile_offset = arith.muli(arith.divui(column, _i32(columns)), _i32(tile))
      piece = arith.andi(arith.shrui(column, _i32(3)), pieces)
      piece = arith.muli(arith.xori(piece, permutation), _i32(16))
      here = arith.addi(arith.addi(offset, tile_offset), piece)
      entries = [_entry(x.registers.item()) for x in rows[n : n + 8]]
      wide = vector.from_elements(
        ir.VectorType.get((8,), ir.F32Type.get()), entries
      )
      narrow = arith.truncf(ir.VectorType.get((8,), kind.element_type), wide)
      llvm.store(
        narrow, utils.getelementptr(base, [here], _byte()), alignment=16
      )
    return ()

  run(ref, first, *rows)


def substitute(T: Any, X: Any) -> None:
  """Inverts I - T of four strictly lower triangular blocks of 16 by 16.

  Forward substitution in float32: a warp has a block, a lane a column of X. A
  row of T is read by all lanes at once. As soon as a row of X is known, its
  share of all later rows is added, so the chain has 16 steps.

  Args:
    T: [64, 16], float32, untiled; the blocks are below one another.
    X: [64, 32], float32, untiled, for the inverses; columns 16 to 31 are set
      to zero.
  """
  if target.is_interpreted():
    blocks = T[...].reshape(4, 16, 16)
    rows = []
    for r in range(16):
      row = jnp.broadcast_to(jnp.float32(jnp.arange(32) == r), (4, 32))
      for n in range(r):
        row += blocks[:, r, n : n + 1] * rows[n]
      rows.append(row)
    X[...] = jnp.stack(rows, axis=1).reshape(64, 32)
    return

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
  def run(ctx, T, X):
    del ctx
    f32 = ir.F32Type.get()
    four = ir.VectorType.get((4,), f32)
    thread = arith.remui(utils.thread_idx(), _i32(_THREADS))
    warp, lane = arith.shrui(thread, _i32(5)), arith.andi(thread, _i32(31))
    T = utils.getelementptr(
      utils.memref_ptr(T), [arith.muli(warp, _i32(16 * 16))], f32
    )
    column = arith.addi(arith.muli(warp, _i32(16 * 32)), lane)
    X = utils.getelementptr(utils.memref_ptr(X), [column], f32)
    one, zero = (
      arith.constant(f32, ir.FloatAttr.get(f32, x)) for x in (1.0, 0.0)
    )
    rows = [
      arith.select(arith.cmpi(arith.CmpIPredicate.eq, lane, _i32(r)), one, zero)
      for r in range(16)
    ]
    for first in range(0, 16, 4):  # columns of T, four at a time
      t = {
        r: llvm.load(
          four, utils.getelementptr(T, [16 * r + first], f32), alignment=16
        )
        for r in range(first + 1, 16)
      }
      for m in range(4):
        n = first + m
        llvm.store(rows[n], utils.getelementptr(X, [32 * n], f32))
        for r in range(n + 1, 16):
          rows[r] = math_dialect.fma(_entry(t[r], m), rows[n], rows[r])
    return ()

  run(T, X)


def any_differs(ref: Any, first: Any, count: int, value: int) -> Any:
  """True if one of ref[first:first + count], int32, is not `value`; a scalar.

  Every warp votes; count is a power of two, at most 32.
  """
  if target.is_interpreted():
    return jnp.any(ref[pl.ds(first, count)] != value)

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(), SCALAR),
    return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR),
  )
  def run(ctx, ref, first):
    del ctx
    i32 = ir.IntegerType.get_signless(32)
    lane = arith.andi(utils.thread_idx(), _i32(count - 1))
    index = arith.addi(first.registers.item(), lane)
    word = llvm.load(
      i32, utils.getelementptr(utils.memref_ptr(ref), [index], i32)
    )
    differs = arith.xori(word, _i32(value))
    return _scalar(_asm(VOTE_ANY, differs))

  return run(ref, first) != 0


def widen(x: Any, layout: Any = plgpu.Layout.WGMMA) -> Any:
  """Converts x to float32, from 16-bit numbers in a layout of even vectors.

  Of bfloat16 LLVM makes three instructions for a pair; here it is two.
  """
  if target.is_interpreted() or x.dtype != jnp.bfloat16:
    return x.astype(jnp.float32)

  def convert(narrow, count):
    f32, numbers = ir.F32Type.get(), []
    pairs = vector.bitcast(
      ir.VectorType.get((count // 2,), _i32(0).type), narrow
    )
    for n in range(count // 2):
      pair = _entry(pairs, n)
      high = arith.andi(pair, _i32(-(2**16)))
      numbers += [
        arith.bitcast(f32, bits) for bits in (arith.shli(pair, _i32(16)), high)
      ]
    return numbers

  return _by_register(convert, x, layout)


def reciprocal(x: Any, layout: Any = plgpu.Layout.WGMMA) -> Any:
  """1 / x of float32, with an error of one unit in the last place; 0 of inf."""
  if target.is_interpreted():
    return 1.0 / x
  return _pointwise(RECIPROCAL, x, layout)


def exp2_of_minus_abs(x: Any, layout: Any = plgpu.Layout.WGMMA) -> Any:
  """2^-|x| of float32, in one instruction."""
  if target.is_interpreted():
    return jnp.exp2(-jnp.abs(x))
  return _pointwise(EXP2_OF_MINUS_ABS, x, layout)


def _pointwise(text, x, layout):
  """Assembly of one number, for all numbers of x, float32."""

  def convert(numbers, count):
    f32 = ir.F32Type.get()
    return [
      llvm.inline_asm(f32, [_entry(numbers, n)], text, "=f,f")
      for n in range(count)
    ]

  return _by_register(convert, x, layout)


def _by_register(convert, x, layout):
  """Float32 numbers convert(vector, its length) of every vector of x."""

  @plgpu.inline_mgpu(
    arg_types=(layout,),
    return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=layout),
  )
  def run(ctx, x):
    del ctx
    registers = np.empty_like(x.registers)
    for index, old in np.ndenumerate(x.registers):
      (count,) = ir.VectorType(old.type).shape
      wide = ir.VectorType.get((count,), ir.F32Type.get())
      registers[index] = vector.from_elements(wide, convert(old, count))
    return fa.FragmentedArray(
      _registers=registers, _layout=x.layout, _is_signed=None
    )

  return run(x)


def join(parts: Sequence[Any]) -> Any:
  """Concatenates [64, n] arrays in the layout of wgmma results by columns."""
  if target.is_interpreted():
    return jnp.concatenate(parts, axis=1)
  layout = plgpu.Layout.WGMMA
  shape = (parts[0].shape[0], sum(x.shape[1] for x in parts))

  @plgpu.inline_mgpu(
    arg_types=tuple(layout for _ in parts),
    return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout),
  )
  def run(ctx, *parts):
    del ctx
    registers = np.concatenate([x.registers for x in parts], axis=1)
    return fa.FragmentedArray(
      _registers=registers, _layout=parts[0].layout, _is_signed=None
    )

  return run(*parts)


# PTX: $0 is the result and $1 the operand, 32 bits each.
VOTE_ANY = (
  "{ .reg .pred p; setp.ne.u32 p, $1, 0; "
  "vote.sync.any.pred p, p, -1; selp.u32 $0, 1, 0, p; }"
)
RECIPROCAL = "rcp.approx.ftz.f32 $0, $1;"
EXP2_OF_MINUS_ABS = (
  "{ .reg .f32 x; abs.f32 x, $1; neg.f32 x, x; ex2.approx.ftz.f32 $0, x; }"
)


def _asm(text, operand):
  return llvm.inline_asm(
    operand.type, [operand], text, "=r,r", has_side_effects=True
  )


def _i32(x):
  i32 = ir.IntegerType.get_signless(32)
  return arith.constant(i32, ir.IntegerAttr.get(i32, x))


def _byte():
  return ir.IntegerType.get_signless(8)


def _entry(x, n=0):
  return vector.extract(x, dynamic_position=[], static_position=[n])


def _scalar(x):
  return fa.FragmentedArray.splat(x, (), is_signed=True)
