"""Execution of a warpgroup's device code, in NumPy, from Mosaic GPU's module.

plgpu.inline_mgpu leaves an operation with a body of arith, vector, math and
llvm operations, which one thread executes. Here all 128 threads execute one
operation after another; shared memory is an array of bytes. Inline assembly is
known by its text. An unknown operation is an error, and so are an address
outside of the operands, a wrong alignment, and two threads that store different
bits at one address.
"""

import itertools
import math
import operator

import ml_dtypes
import numpy as np
from jax._src.interpreters import mlir
from jax._src.lib import mosaic_gpu_dialect
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import layouts
from jax.extend.mlir import ir

from gdn2_jax.pallas import inline

THREADS, WARPS, LANES = 128, 4, 32
_BASE = 4096  # address of the first operand
_ALIGNMENT = 1024

_TYPES = {
  "f32": np.float32,
  "f16": np.float16,
  "bf16": ml_dtypes.bfloat16,
  "i32": np.int32,
}
_UNSIGNED = {
  "arith.muli": operator.mul,
  "arith.addi": operator.add,
  "arith.divui": operator.floordiv,
  "arith.remui": operator.mod,
  "arith.shrui": operator.rshift,
  "llvm.mul": operator.mul,
  "llvm.add": operator.add,
}
_PLAIN = {
  "arith.andi": operator.and_,
  "arith.ori": operator.or_,
  "arith.xori": operator.xor,
  "arith.addf": operator.add,
}
_BITCASTS = {"arith.bitcast", "llvm.bitcast", "vector.bitcast"}
_COPIES = {
  "arith.index_cast",
  "arith.index_castui",
  "llvm.ptrtoint",
  "llvm.inttoptr",
}


def bodies(module):
  """Operations made by inline_mgpu, in program order; keep the module."""
  context = mlir.make_ir_context()
  with context:
    mosaic_gpu_dialect.register_dialect(context)
    parsed = ir.Module.parse(module)
  found = []

  def visit(op):
    if op.name == "mosaic_gpu.custom_primitive":
      found.append(op)
    return ir.WalkResult.ADVANCE

  parsed.operation.walk(visit, ir.WalkOrder.PRE_ORDER)
  return parsed, found


def distribution(shape, layout):
  """Indices of elements that threads hold, [registers, threads, vector]."""
  index = np.arange(math.prod(shape)).reshape(shape)
  if isinstance(layout, fa.WGStridedFragLayout):
    return index.reshape(-1, THREADS, layout.vec_size)
  for tile in layout.tiling.tiles:
    lead = index.ndim - len(tile)
    split = [(n // t, t) for n, t in zip(index.shape[lead:], tile, strict=True)]
    index = index.reshape(*index.shape[:lead], *itertools.chain(*split))
    outer = [lead + 2 * n for n in range(len(tile))]
    index = index.transpose(*range(lead), *outer, *(n + 1 for n in outer))
  rank = index.ndim
  threads = []
  for warp, lane in itertools.product(range(WARPS), range(LANES)):
    here = [slice(None)] * rank
    for number, dimensions in (
      (warp, layout.warp_dims),
      (lane, layout.lane_dims),
    ):
      for d in reversed(dimensions):
        size = index.shape[d] if isinstance(d, int) else d.times
        number, part = divmod(number, size)
        if isinstance(d, int):
          here[d] = slice(part, part + 1)
    mine = np.moveaxis(index[tuple(here)], layout.vector_dim, -1)
    threads.append(mine.reshape(-1, mine.shape[-1]))
  return np.stack(threads, axis=1)


class Warpgroup:
  """128 threads; `run` executes a body and returns what it returns.

  Attributes:
    stores: addresses [threads] and bytes of every store, in order.
  """

  def __init__(self, number=0):
    self.thread = number * THREADS + np.arange(THREADS)
    self.active = np.full(THREADS, True)
    self.stores = []

  def run(self, op, *operands):
    """Executes with operands: arrays of their shape (changed), or integers."""
    (block,) = op.regions[0].blocks
    assert len(operands) == len(block.arguments)
    self.values, self.places, size = {}, [], _BASE
    for argument, x in zip(block.arguments, operands, strict=True):
      if isinstance(argument.type, ir.MemRefType):
        self.places.append((size, x))
        self.values[argument] = size
        size += -(-x.nbytes // _ALIGNMENT) * _ALIGNMENT
      else:
        self.values[argument] = np.asarray(x)
    self.memory = np.zeros(size, np.uint8)
    for start, x in self.places:
      assert x.flags.c_contiguous
      self.memory[start : start + x.nbytes] = x.reshape(-1).view(np.uint8)
    for each in block.operations:
      if each.operation.name == "mosaic_gpu.return":
        result = [self.values[x] for x in each.operation.operands]
        break
      self.values |= self._execute(each.operation)
    for start, x in self.places:
      x.reshape(-1).view(np.uint8)[:] = self.memory[start : start + x.nbytes]
    return result[0] if len(result) == 1 else tuple(result) or None

  def _execute(self, op):
    name = op.name
    x = [self.values[operand] for operand in op.operands]
    if name == "builtin.unrealized_conversion_cast":
      return self._cast(op, x)
    if name == "scf.if":
      self._branch(op, *x)
      return {}
    if not op.results:
      store = {"llvm.store": self._store, "nvvm.stmatrix": self._store_matrix}
      store[name](op, *x)
      return {}
    return {op.results[0]: self._value(op, name, x)}

  def _value(self, op, name, x):
    attributes = op.attributes
    if name == "arith.constant":
      if isinstance(attributes["value"], ir.DenseElementsAttr):
        return np.tile(np.array(attributes["value"]), (THREADS, 1))
      return np.full(THREADS, attributes["value"].value, _numpy(op))
    if name in ("gpu.thread_id", "gpu.block_dim"):
      if str(attributes["dimension"]) != "#gpu.dim<x>":
        return np.full(THREADS, int(name == "gpu.block_dim"))
      return self.thread if name == "gpu.thread_id" else 512
    if name in _COPIES:
      return x[0]
    if name in _UNSIGNED:
      assert np.all(x[0] >= 0) and np.all(x[1] >= 0), name
      return _UNSIGNED[name](*x)
    if name == "arith.shli":
      return (np.asarray(x[0], np.int64) << x[1]).astype(np.int32)
    if name == "arith.subi":
      return np.asarray(x[0], np.int64) - x[1]
    if name in _PLAIN:
      return _PLAIN[name](*x)
    if name == "arith.cmpi":
      equal = x[0] == x[1]
      return {0: equal, 1: ~equal}[attributes["predicate"].value]
    if name in _BITCASTS:
      parts = np.ascontiguousarray(x[0].reshape(THREADS, -1)).view(_numpy(op))
      return parts if _is_vector(op.results[0].type) else parts[:, 0]
    if name == "nvvm.shfl.sync":
      return self._exchange(str(attributes["kind"]), *x)
    if name == "arith.select":
      flag = np.asarray(x[0])
      return np.where(flag.reshape(flag.shape + (1,) * (x[1].ndim - 1)), *x[1:])
    if name == "arith.truncf":
      return x[0].astype(_numpy(op))
    if name == "math.rsqrt":
      with np.errstate(invalid="ignore"):
        return (1 / np.sqrt(x[0].astype(np.float64))).astype(np.float32)
    if name == "math.fma":
      a, b, c = (y.astype(np.float64) for y in x)
      return (a * b + c).astype(np.float32)
    if name == "vector.extract":
      return x[0][:, attributes["static_position"][0]]
    if name == "vector.extract_strided_slice":
      (first,), (count,) = (
        [n.value for n in attributes[key]] for key in ("offsets", "sizes")
      )
      return x[0][:, first : first + count]
    if name == "vector.broadcast":
      return np.repeat(x[0][:, None], _count(op.results[0].type), axis=1)
    if name == "vector.insert":
      changed = x[1].copy()
      changed[:, attributes["static_position"][0]] = x[0]
      return changed
    if name == "llvm.mlir.undef":
      return np.zeros((THREADS, _count(op.results[0].type)), _numpy(op))
    if name == "vector.interleave":
      return np.stack(x, axis=2).reshape(THREADS, -1)
    if name == "vector.shuffle":
      return np.concatenate(x, axis=1)[:, list(attributes["mask"])]
    if name == "vector.from_elements":
      return np.stack(x, axis=1)
    if name == "llvm.extractvalue":  # a memref: address, or offset
      return x[0] if next(iter(attributes["position"])) == 1 else np.int64(0)
    if name == "llvm.getelementptr":
      return self._address(op, *x)
    if name == "llvm.load":
      return self._load(op, *x)
    assert name == "llvm.inline_asm", f"unknown operation {name}"
    return self._asm(attributes["asm_string"].value, *x)

  def _cast(self, op, x):
    if "layout" not in op.attributes:
      return {op.results[0]: x[0]}  # of a memref: its address
    layout = layouts.from_layout_attr(op.attributes["layout"])
    if len(op.operands) > 1:  # registers of one thread to an array of all
      shape = ir.VectorType(op.results[0].type).shape
      whole = np.zeros(math.prod(shape), np.float32)
      whole[distribution(shape, layout)] = np.stack(x)
      return {op.results[0]: whole.reshape(shape)}
    shape = ir.VectorType(op.operands[0].type).shape
    parts = x[0].reshape(-1)[distribution(shape, layout)]
    return dict(zip(op.results, parts, strict=True))

  def _address(self, op, base, *indices):
    constants = list(op.attributes["rawConstantIndices"])
    (constant,) = constants
    index = indices[0] if indices else constant
    kind = ir.TypeAttr(op.attributes["elem_type"]).value
    count = _count(kind)
    if _is_vector(kind):
      kind = ir.VectorType(kind).element_type
    width = kind.width * count // 8
    return base + np.asarray(index, np.int64) * width

  def _spans(self, op, address, kind):
    """Bytes [threads, n] that threads access; checks range and alignment."""
    dtype, count = _numpy_of(kind), _count(kind)
    size = np.dtype(dtype).itemsize * count
    address = np.broadcast_to(address, THREADS)
    aligned = "alignment" in op.attributes
    step = op.attributes["alignment"].value if aligned else size
    assert not np.any(address[self.active] % step), "alignment"
    inside = [
      (address >= start) & (address + size <= start + x.nbytes)
      for start, x in self.places
    ]
    outside = self.active & ~np.any(inside, axis=0)
    assert not outside.any(), "an address outside of the operands"
    return address[:, None] + np.arange(size), dtype, count

  def _load(self, op, address):
    spans, dtype, count = self._spans(op, address, op.results[0].type)
    x = self.memory[spans].view(dtype)
    return x if count > 1 else x[:, 0]

  def _store(self, op, x, address):
    spans, dtype, count = self._spans(op, address, op.operands[0].type)
    x = np.broadcast_to(x.reshape(-1, count), (THREADS, count)).astype(dtype)
    self._write(spans, x.view(np.uint8))

  def _write(self, spans, x):
    spans, x = spans[self.active], x[self.active]
    self.memory[spans] = x
    assert np.array_equal(self.memory[spans], x), "a conflict"
    self.stores.append(spans)

  def _branch(self, op, condition):
    """Executes the first region in the threads that meet the condition."""
    (block,) = op.regions[0].blocks
    assert not list(op.regions[1].blocks)
    before, self.active = self.active, self.active & condition
    for each in block.operations:
      if each.operation.name != "scf.yield":
        self.values |= self._execute(each.operation)
    self.active = before

  def _exchange(self, kind, mask, x, lane, clamp):
    assert np.all(mask == -1) and np.all(clamp == LANES - 1)
    lanes = np.arange(THREADS) % LANES
    if "bfly" in kind:
      lane = lanes ^ lane
    else:
      assert "idx" in kind, kind
    return np.broadcast_to(x, THREADS)[np.arange(THREADS) - lanes + lane]

  def _store_matrix(self, op, address, *registers):
    """Matrices of 8 by 8 of 16 bits; of each, eight lanes have the rows."""
    assert "row" in str(op.attributes["layout"])
    lane = np.arange(THREADS) % LANES
    for n, x in enumerate(registers):
      row = np.arange(THREADS) - lane + 8 * n + lane // 4
      rows = np.broadcast_to(address, THREADS)[row]
      x = np.ascontiguousarray(np.broadcast_to(x, THREADS), np.int32)
      assert not np.any(rows % 16), "alignment"
      spans = (rows + 4 * (lane % 4))[:, None] + np.arange(4)
      self._write(spans, x.view(np.uint8).reshape(THREADS, 4))

  def _asm(self, text, x):
    if text == inline.RECIPROCAL:
      return (1 / x.astype(np.float64)).astype(np.float32)
    if text == inline.EXP2_OF_MINUS_ABS:
      return np.exp2(-np.abs(x.astype(np.float64))).astype(np.float32)
    x = np.broadcast_to(x, THREADS).reshape(WARPS, LANES)
    if text == inline.VOTE_ANY:
      x = (x != 0).any(axis=1)
    else:
      raise AssertionError(f"unknown assembly: {text}")
    return np.repeat(x.astype(np.int32), LANES)


def _is_vector(kind):
  return isinstance(kind, ir.VectorType)


def _count(kind):
  return ir.VectorType(kind).shape[0] if _is_vector(kind) else 1


def _numpy(op):
  return _numpy_of(op.results[0].type)


def _numpy_of(kind):
  if isinstance(kind, ir.VectorType):
    kind = ir.VectorType(kind).element_type
  return _TYPES.get(str(kind), np.int64)
