"""Arrays [channels, tokens] in the layout of wgmma results.

A thread has two channels of four (a quarter of the) tokens of every eight, so a
neighbour of a token at a distance of 1, 8 or 16 is in the same thread, and one
at 2 or 4 in another lane of the same four. Plain Pallas has neither that
exchange nor transposed accesses of 32-bit numbers: plgpu.inline_mgpu, which the
interpreter lacks. It gets the same in jax.numpy.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxlib.mlir.dialects import math as math_dialect

from gdn2_jax.kernels import target
from gdn2_jax.pallas import blocks, projected
from gdn2_jax.pallas.blocks import ROWS, TILE, C

HALF = C // 2  # tokens of a warpgroup
PART = 32  # value channels of a tile in shared memory
BLOCK = 16  # tokens of a product with the gradients of scores
LEVELS = (8, 4, 2, 1)  # half a block of the tree, of the levels inside BLOCK


def _layout():
  """Layout of [tokens, 64] whose transposition is ROWS, one number a time."""
  # The tiled shape is [tokens / 8, 1, 1, 4, 1, 2, 4, 8, 2, 1].
  return blocks.register_layout(
    ((8, TILE), (8, 16), (8, 8), (2, 1)), (-7,), (-3, -4)
  )


_COLUMNS = _layout()


def neighbour(x, distance, *, in_pairs=False):
  """x[:, c ^ distance] for every column c of x [64, N], float32.

  Args:
    x: Array in the layout of wgmma results.
    distance: A power of two below N.
    in_pairs: Columns 2*n and 2*n + 1 are equal, so one number is exchanged.
  """
  N = x.shape[1]
  if target.is_interpreted():
    pairs = x.reshape(TILE, -1, 2, distance)
    return jnp.flip(pairs, axis=2).reshape(TILE, N)

  @plgpu.inline_mgpu(
    arg_types=(ROWS,),
    return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=ROWS),
  )
  def exchange(ctx, x):
    del ctx
    registers = x.registers.copy()
    if distance >= 8:  # tiles of 8 columns
      registers = registers[:, np.arange(N // 8) ^ (distance // 8)]
    else:
      for index, pair in np.ndenumerate(registers):
        if distance == 1:
          parts = [utils.vector_slice(pair, slice(n, n + 1)) for n in (1, 0)]
          registers[index] = utils.vector_concat(parts)
        elif in_pairs:
          one = utils.vector_slice(pair, slice(0, 1))
          one = utils.shfl_bfly(one, distance // 2)
          registers[index] = utils.vector_concat([one, one])
        else:
          registers[index] = utils.shfl_bfly(pair, distance // 2)
    return fragmented_array.FragmentedArray(
      _registers=registers, _layout=x.layout, _is_signed=None
    )

  return exchange(x)


def load(ref):
  """Loads a 16-bit ref [tokens, 64] as an array [64, tokens]."""
  return plgpu.load(ref.transpose((1, 0)), layout=ROWS)


def store(ref, x):
  """Stores x [64, tokens] in a 16-bit ref [tokens, 64]."""
  ref = ref.transpose((1, 0))
  x = x.astype(ref.dtype)
  if hasattr(plgpu, "store"):
    plgpu.store(ref, x)
  else:  # jax 0.11
    ref[...] = x


def store_norms(ref, x, kinds):
  """Stores 1 / |y| of 64 rows y, from x = y y^T [64, 64], in ref [64].

  y is taken as zero at padding, where x may be NaN.

  Args:
    ref: float32, untiled, in shared memory.
    x: float32, in the layout of wgmma results.
    kinds: [64], int32, in shared memory.
  """
  if target.is_interpreted():
    squares = jnp.where(kinds[...] == blocks.PADDING, 0.0, jnp.diagonal(x))
    ref[...] = lax.rsqrt(squares + projected.EPS)
    return

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ROWS, plgpu.RefType()))
  def run(ctx, ref, x, kinds):
    del ctx
    i32 = ir.IntegerType.get_signless(32)

    def constant(n):
      return utils.c(n, i32)

    def equal(a, n):
      return arith.cmpi(arith.CmpIPredicate.eq, a, constant(n))

    thread = arith.andi(utils.thread_idx(), constant(127))
    warp = arith.shrui(thread, constant(5))
    # Of 8 rows, a thread has row `of_eight`, and columns 2 * pair and the next.
    of_eight = arith.andi(arith.shrui(thread, constant(2)), constant(7))
    pair = arith.andi(thread, constant(3))
    distance = arith.subi(arith.shrui(of_eight, constant(1)), pair)
    is_odd = equal(arith.andi(of_eight, constant(1)), 1)
    # [column tile of 8, half of the 16 rows of a warp]
    tiles = x.registers.reshape(8, 2)
    base = arith.addi(arith.muli(warp, constant(16)), of_eight)
    zero, eps = (utils.c(x, ir.F32Type.get()) for x in (0.0, projected.EPS))
    for half in range(2):
      value = tiles[half, half]
      for n in range(1, 4):
        value = arith.select(equal(warp, n), tiles[2 * n + half, half], value)
      one, two = (
        vector.extract(value, dynamic_position=[], static_position=[n])
        for n in range(2)
      )
      value = arith.select(is_odd, two, one)
      row = arith.addi(base, constant(8 * half))

      def at(memory, kind, row=row):
        return utils.getelementptr(utils.memref_ptr(memory), [row], kind)

      kind = llvm.load(i32, at(kinds, i32))
      value = arith.select(equal(kind, blocks.PADDING), zero, value)
      value = math_dialect.rsqrt(arith.addf(value, eps))
      with utils.when(equal(distance, 0)):
        llvm.store(value, at(ref, ir.F32Type.get()))
    return ()

  run(ref, x, kinds)


def load_global(ref):
  """Loads a ref [tokens, 64] in global memory as a float32 [64, tokens]."""
  x = plgpu.load(ref, layout=_COLUMNS, optimized=False)
  shape = x.shape[::-1]
  if target.is_interpreted():
    return x.T.astype(jnp.float32)

  @plgpu.inline_mgpu(
    arg_types=(_COLUMNS,),
    return_type=plgpu.ShapeDtypeStruct(shape, x.dtype, layout=ROWS),
  )
  def transpose(ctx, x):
    del ctx
    pairs = x.registers.reshape(-1, 2)
    layout = fragmented_array.WGMMA_LAYOUT
    registers = np.empty(len(pairs), object)
    for n, pair in enumerate(pairs):
      registers[n] = utils.vector_concat(list(pair))
    return fragmented_array.FragmentedArray(
      _registers=registers.reshape(layout.registers_shape(shape)),
      _layout=layout,
      _is_signed=None,
    )

  return transpose(x).astype(jnp.float32)


def store_global(ref, x):
  """Stores x [64, tokens] in a ref [tokens, 64] in global memory."""
  shape = x.shape[::-1]
  if target.is_interpreted():
    ref[...] = x.T
    return

  @plgpu.inline_mgpu(
    arg_types=(ROWS,),
    return_type=plgpu.ShapeDtypeStruct(shape, x.dtype, layout=_COLUMNS),
  )
  def transpose(ctx, x):
    del ctx
    layout = _COLUMNS.to_mgpu()
    registers = np.empty(2 * x.registers.size, object)
    for n, pair in enumerate(x.registers.flat):
      for m in range(2):
        registers[2 * n + m] = utils.vector_slice(pair, slice(m, m + 1))
    return fragmented_array.FragmentedArray(
      _registers=registers.reshape(layout.registers_shape(shape)),
      _layout=layout,
      _is_signed=None,
    )

  blocks.store_untiled(ref, transpose(x))


def keep(ref, x):
  """Stores x [64, N], float32, in an untiled ref [64 * N], for `kept` alone.

  Every thread stores its numbers as they are, without bank conflicts.
  """
  if target.is_interpreted():
    ref[...] = x.reshape(-1)
    return

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ROWS))
  def store(ctx, ref, x):
    del ctx
    for n, pair in enumerate(x.registers.flat):
      llvm.store(pair, _kept_at(ref, n), alignment=8)
    return ()

  store(ref, x)


def kept(ref, shape):
  """Loads what this thread stored by `keep` as an array of a shape."""
  if target.is_interpreted():
    return ref[...].reshape(shape)

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(),),
    return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=ROWS),
  )
  def load(ctx, ref):
    del ctx
    layout = fragmented_array.WGMMA_LAYOUT
    registers = np.empty(layout.registers_shape(shape), object)
    pair = ir.VectorType.get((2,), ir.F32Type.get())
    for n in range(registers.size):
      registers.flat[n] = llvm.load(pair, _kept_at(ref, n), alignment=8)
    return fragmented_array.FragmentedArray(
      _registers=registers, _layout=layout, _is_signed=None
    )

  return load(ref)


def _kept_at(ref, n):
  i32 = ir.IntegerType.get_signless(32)
  thread = arith.andi(utils.thread_idx(), utils.c(127, i32))
  at = arith.muli(thread, utils.c(2, i32))
  pointer = utils.getelementptr(utils.memref_ptr(ref), [at], ir.F32Type.get())
  return utils.getelementptr(pointer, [256 * n], ir.F32Type.get())


def iota(width):
  """Numbers of the columns of an array [64, width]."""
  return plgpu.broadcasted_iota(jnp.int32, (TILE, width), 1, layout=ROWS)


def is_second(width, half):
  """True in columns of second halves of blocks of 2 * half columns."""
  if target.is_interpreted():
    return (iota(width) & half) != 0

  @plgpu.inline_mgpu(
    return_type=plgpu.ShapeDtypeStruct((TILE, width), jnp.int32, layout=ROWS)
  )
  def bits(ctx):
    # iota would make a predicate of every column; these are one or none.
    del ctx
    i32 = ir.IntegerType.get_signless(32)
    layout = fragmented_array.WGMMA_LAYOUT
    registers = np.empty(layout.registers_shape((TILE, width)), object)
    lane = arith.andi(utils.thread_idx(), utils.c(half // 2, i32))
    for index in np.ndindex(registers.shape):
      if half >= 8:  # tiles of 8 columns
        pair = [utils.c(index[1] & (half // 8), i32)] * 2
      else:
        pair = [lane] * 2 if half > 1 else [utils.c(n, i32) for n in range(2)]
      registers[index] = vector.from_elements(
        ir.VectorType.get((2,), i32), pair
      )
    return fragmented_array.FragmentedArray(
      _registers=registers, _layout=layout, _is_signed=True
    )

  return bits() != 0


def opaque_zero():
  """0, which LLVM does not know.

  LLVM moves what does not change out of loops and keeps it in registers, which
  then spill. Addresses that include this zero are computed where they are used.
  """
  if target.is_interpreted():
    return jnp.int32(0)
  scalar = plgpu.Layout.WG_STRIDED((128,), vec_size=1)  # any will do

  @plgpu.inline_mgpu(
    return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=scalar)
  )
  def zero(ctx):
    del ctx
    i32 = ir.IntegerType.get_signless(32)
    x = llvm.inline_asm(i32, [], "mov.b32 $0, 0;", "=r", has_side_effects=True)
    return fragmented_array.FragmentedArray.splat(x, (), is_signed=True)

  return zero()


class Decays:
  """Products of decays a [64, N] over blocks of tokens, level after level.

  Attributes:
    prefix: product from the start of the block of `half` tokens to each.
    suffix: product of those after each, up to the end of its block.
    total: product of its block, the same for all tokens of the block.
    half: tokens of a block.
  """

  def __init__(self, a):
    self.prefix, self.suffix, self.total = a, jnp.ones_like(a), a
    self.half = 1

  def climb(self, size):
    """Goes up to blocks of `size` tokens."""
    while self.half < size:
      other = self.other()
      second = is_second(other.shape[1], self.half)
      self.prefix = jnp.where(second, self.prefix * other, self.prefix)
      self.suffix = jnp.where(second, self.suffix, self.suffix * other)
      self.total *= other
      self.half *= 2
    return self

  def other(self):
    """Total of the block that this block is joined with one level up."""
    return neighbour(self.total, self.half, in_pairs=self.half > 1)
