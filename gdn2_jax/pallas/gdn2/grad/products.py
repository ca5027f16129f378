"""Matrix products of a warpgroup, several under way at a time.

plgpu.wgmma takes one product, and LLVM moves the descriptors of its operands
out of loops and shares them between products far apart, in more registers than
there are. Therefore products are plgpu.inline_mgpu here, with addresses that
LLVM knows nothing about. The interpreter lacks it and uses jnp.dot.
"""

from typing import Any, NamedTuple

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jaxlib.mlir.dialects import llvm, nvvm

from gdn2_jax.kernels import target
from gdn2_jax.pallas import blocks
from gdn2_jax.pallas.blocks import ROWS


class Operand(NamedTuple):
  """A matrix in shared memory.

  Attributes:
    ref: 16-bit, in tiles of 8 by `columns`, swizzled over a row of a tile.
    columns: 16, 32 or 64.
    is_transposed: The product takes the transposed matrix.
  """

  ref: Any
  columns: int
  is_transposed: bool = False

  @property
  def T(self) -> "Operand":
    """The transposed matrix."""
    return self._replace(is_transposed=not self.is_transposed)


def dots(*sums: tuple[Any, list[tuple[Any, Any]]]) -> list[Any]:
  """Computes acc + sum of a @ b for each (acc, [(a, b), ...]).

  acc is float32 in the layout of wgmma results, a an Operand or a 16-bit array
  in that layout, b an Operand. All products are under way before the first is
  waited for; as in blocks.dot, operands are free when it returns.
  """
  if target.is_interpreted():
    return [_interpreted(acc, pairs) for acc, pairs in sums]
  operands, numbers = [], {}

  def number(x):
    if id(x) not in numbers:
      numbers[id(x)] = len(operands)
      operands.append(x)
    return numbers[id(x)]

  accs = [acc for acc, _ in sums]
  plan = [[(number(a), number(b)) for a, b in pairs] for _, pairs in sums]
  types = [_argument_type(x) for x in operands]

  @plgpu.inline_mgpu(
    arg_types=(*[ROWS] * len(accs), *types),
    return_type=tuple(
      plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=ROWS) for x in accs
    ),
  )
  def run(ctx, *args):
    del ctx
    results = [
      mgpu.WGMMAAccumulator.from_registers(x) for x in args[: len(accs)]
    ]
    values = [
      _view(value, x) if isinstance(x, Operand) else value
      for value, x in zip(args[len(accs) :], operands, strict=True)
    ]
    # In turns: a product waits for the one before on its accumulator.
    for turn in range(max(map(len, plan))):
      for n, pairs in enumerate(plan):
        if turn < len(pairs):
          a, b = pairs[turn]
          swizzle = 2 * operands[b].columns
          results[n] = mgpu.wgmma(
            results[n], values[a], values[b], swizzle=swizzle
          )
    nvvm.wgmma_commit_group_sync_aligned()
    nvvm.wgmma_wait_group_sync_aligned(0)
    # Else LLVM moves work on the results in front of the wait.
    return tuple(
      fragmented_array.optimization_barrier(x.value) for x in results
    )

  refs = [x.ref if isinstance(x, Operand) else x for x in operands]
  return list(run(*accs, *refs))


def dot(acc: Any, *pairs: tuple[Any, Any]) -> Any:
  """Computes acc + sum of a @ b; see dots."""
  return dots((acc, list(pairs)))[0]


def _interpreted(acc, pairs):
  def value(x):
    if not isinstance(x, Operand):
      return x
    return blocks.transposed(x.ref) if x.is_transposed else x.ref

  return blocks.dot(acc, *((value(a), value(b)) for a, b in pairs))


def _argument_type(x):
  if not isinstance(x, Operand):
    return ROWS
  swizzle = plgpu.SwizzleTransform(2 * x.columns)
  return plgpu.RefType((plgpu.TilingTransform((8, x.columns)), swizzle))


def _view(ref, x):
  """The memory of operand x at an address that is opaque to LLVM."""
  kind = ir.MemRefType(ref.type)
  strides, _ = kind.get_strides_and_offset()
  i32 = ir.IntegerType.get_signless(32)
  pointer = utils.memref_ptr(ref)
  address = llvm.ptrtoint(i32, pointer)
  address = llvm.inline_asm(
    i32, [address], "mov.b32 $0, $1;", "=r,r", has_side_effects=True
  )
  layout = ir.StridedLayoutAttr.get(0, strides)
  kind = ir.MemRefType.get(
    kind.shape, kind.element_type, layout, kind.memory_space
  )
  view = utils.ptr_as_memref(llvm.inttoptr(pointer.type, address), kind)
  return utils.memref_transpose(view, (1, 0, 3, 2)) if x.is_transposed else view
