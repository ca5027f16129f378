"""Sums over channels of arrays [channels, 16], whose channels are in all warps.

A warp adds its 16 channels by exchanges between lanes and stores sums. After
a meeting of the warpgroups every thread adds those of all warps, in one order.
The interpreter lacks plgpu.inline_mgpu and computes the same in jax.numpy.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

from gdn2_jax.kernels import target
from gdn2_jax.pallas.blocks import ROWS, TILE
from gdn2_jax.pallas.gdn2.grad.columns import BLOCK

WARPS = 4
# Of the lanes with the same columns, which hold other rows.
_DISTANCES = (16, 8, 4)


def store(ref, x, y):
  """Stores sums of x and y [64, 16] over the 16 channels of each warp.

  Args:
    ref: [16, 2, 4], float32, untiled: sums by column, array and warp.
    x: float32, in the layout of wgmma results.
    y: the same.
  """
  if target.is_interpreted():
    parts = jnp.stack([x, y]).reshape(2, WARPS, -1, BLOCK).sum(axis=2)
    ref[...] = parts.transpose(2, 0, 1)
    return

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ROWS, ROWS))
  def run(ctx, ref, x, y):
    del ctx
    lane, warp = _lane_and_warp()
    values = []
    for array in (x, y):
      for one, other in array.registers.reshape(2, 2):  # rows 8 apart
        values += [
          arith.addf(_entry(one, n), _entry(other, n)) for n in range(2)
        ]
    # Each exchange halves the number of sums that a lane has.
    for distance in _DISTANCES:
      is_upper = arith.cmpi(
        arith.CmpIPredicate.ne, arith.andi(lane, _i32(distance)), _i32(0)
      )
      half = len(values) // 2
      pairs = list(zip(values[:half], values[half:], strict=True))
      kept = [arith.select(is_upper, high, low) for low, high in pairs]
      sent = [arith.select(is_upper, low, high) for low, high in pairs]
      values = [
        arith.addf(mine, utils.shfl_bfly(yours, distance))
        for mine, yours in zip(kept, sent, strict=True)
      ]
    at = arith.addi(arith.muli(_index(lane), _i32(WARPS)), warp)
    f32 = ir.F32Type.get()
    pointer = utils.getelementptr(utils.memref_ptr(ref), [at], f32)
    llvm.store(values[0], pointer)
    return ()

  run(ref, x, y)


def load(ref):
  """Loads what `store` stored for all tiles of channels as two [64, 16].

  Args:
    ref: [tiles, 16, 2, 4], float32, untiled.
  """
  tiles, shape = ref.shape[0], (TILE, BLOCK)
  if target.is_interpreted():
    sums = ref[...].sum(axis=(0, 3))
    return [lax.broadcast_in_dim(sums[:, n], shape, (1,)) for n in range(2)]
  kind = plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=ROWS)

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=(kind, kind))
  def run(ctx, ref):
    del ctx
    lane, _ = _lane_and_warp()
    f32 = ir.F32Type.get()
    four = ir.VectorType.get((WARPS,), f32)
    at = arith.muli(_index(lane), _i32(WARPS))
    base = utils.getelementptr(utils.memref_ptr(ref), [at], f32)
    parts = []
    for n in range(tiles):
      pointer = utils.getelementptr(base, [2 * BLOCK * WARPS * n], f32)
      x = llvm.load(four, pointer, alignment=16)
      parts += [_entry(x, warp) for warp in range(WARPS)]
    while len(parts) > 1:
      parts = [
        arith.addf(a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)
      ]
    # A lane has one of the eight sums of its columns; now it gets all.
    sum_bits = utils.bitcast(parts[0], _i32(0).type)
    column = arith.andi(lane, _i32(3))
    sums = []
    for n in range(8):
      source = arith.addi(column, _i32(4 * n))
      bits = nvvm.shfl_sync(
        _i32(-1), sum_bits, source, _i32(31), nvvm.ShflKind.idx
      )
      sums.append(utils.bitcast(bits, f32))
    pair = ir.VectorType.get((2,), f32)
    layout = fragmented_array.WGMMA_LAYOUT
    results = []
    for n in range(0, 8, 4):
      registers = np.empty((2, 2), object)
      for m in range(2):
        registers[m] = vector.from_elements(pair, sums[n + 2 * m :][:2])
      results.append(
        fragmented_array.FragmentedArray(
          _registers=registers.reshape(layout.registers_shape(shape)),
          _layout=layout,
          _is_signed=None,
        )
      )
    return tuple(results)

  return run(ref)


def _lane_and_warp():
  thread = arith.andi(utils.thread_idx(), _i32(127))
  return arith.andi(thread, _i32(31)), arith.shrui(thread, _i32(5))


def _index(lane):
  """Index [column, array] of the sum that a lane has after the exchanges."""
  # Of the eight: array, tile of eight columns, one of two columns.
  which = arith.shrui(lane, _i32(2))
  array = arith.shrui(which, _i32(2))
  tile = arith.andi(arith.shrui(which, _i32(1)), _i32(1))
  odd = arith.andi(which, _i32(1))
  pair = arith.muli(arith.andi(lane, _i32(3)), _i32(2))
  column = arith.addi(arith.addi(arith.muli(tile, _i32(8)), pair), odd)
  return arith.addi(arith.muli(column, _i32(2)), array)


def _i32(x):
  return utils.c(x, ir.IntegerType.get_signless(32))


def _entry(x, n):
  return vector.extract(x, dynamic_position=[], static_position=[n])
