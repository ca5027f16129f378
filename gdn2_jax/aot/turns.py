"""Search for sums across warps that warpgroups run at the same time.

A sum (or maximum) over rows that are spread over warps goes through scratch
memory. Mosaic GPU's Warpgroup lowering gives all warpgroups of a block the same
scratch and lets none wait for another: they overwrite each other's parts. So
one warpgroup after another has to sum, with a meeting of all between. The
interpreter sums in jax.numpy and cannot see it; the compiled module shows it.

Read off Mosaic GPU's module, with the layouts it has inferred:

  a sum across warps   a reduction of a dimension that its layout gives to warps
  who is there         the branches around it, taken by which thread numbers
  a meeting            all arrive at a barrier that waits for as many, and wait

What is not understood counts as dangerous: a branch on anything else may be
taken by all, a loop may turn once or never, an unknown barrier is no meeting.
"""

import dataclasses
import operator
import re
from typing import Any

from jax._src.interpreters import mlir
from jax._src.lib import mosaic_gpu_dialect
from jax.experimental.mosaic.gpu import layouts
from jax.extend.mlir import ir

_WARPGROUP = 128  # threads
_THREADS = re.compile(r"\bthreads\([^)]*\) in \(%\w+ = %c(\d+)")
_REDUCTIONS = "vector.multi_reduction", "vector.reduction"
_IN_SEQUENCE = "builtin.module", "func.func", "gpu.launch"
# The value of operand n; a warp's index is made alike for its lanes by shuffle.
_COPIES = {
  "arith.index_cast": 0,
  "arith.index_castui": 0,
  "arith.extui": 0,
  "arith.trunci": 0,
  "nvvm.shfl.sync": 1,
}
_ARITHMETIC = {
  "arith.addi": operator.add,
  "arith.subi": operator.sub,
  "arith.muli": operator.mul,
  "arith.divui": operator.floordiv,
  "arith.divsi": operator.floordiv,
  "arith.remui": operator.mod,
  "arith.remsi": operator.mod,
  "arith.shrui": operator.rshift,
  "arith.shli": operator.lshift,
  "arith.andi": operator.and_,
  "arith.ori": operator.or_,
  "arith.xori": operator.xor,
}
_COMPARISONS = (  # in the order of arith.cmpi's predicates
  *(operator.eq, operator.ne),
  *2 * (operator.lt, operator.le, operator.gt, operator.ge),
)


def sums_out_of_turn(module: str) -> tuple[str, ...]:
  """Sums across warps that are not in turns, one sentence each.

  Args:
    module: Mosaic GPU's module after layout inference, as it is dumped.

  Raises:
    ValueError: the module has no launch, or cannot be parsed.
  """
  threads = _THREADS.search(module)
  if threads is None:
    raise ValueError("module: expected 'threads(...) in (%x = %cN, ...)'")
  warpgroups = int(threads[1]) // _WARPGROUP
  if warpgroups < 2 or not any(name in module for name in _REDUCTIONS):
    return ()
  context = mlir.make_ir_context()
  with context:
    mosaic_gpu_dialect.register_dialect(context)
    try:
      parsed = ir.Module.parse(module)
    except ir.MLIRError as e:
      raise ValueError(f"cannot parse Mosaic GPU's module: {e}") from e
    kernel = _Kernel(warpgroups)
    kernel.walk(parsed.operation, kernel.all, _State())
  return tuple(kernel.found.values())


@dataclasses.dataclass(frozen=True)
class _State:
  """Sums and arrivals since all warpgroups met.

  Attributes:
    sums: (operation, warpgroup) of sums across warps.
    arrived: barriers at which all warpgroups have arrived.
  """

  sums: frozenset[tuple[Any, int]] = frozenset()
  arrived: frozenset[Any] = frozenset()

  def or_else(self, other: "_State") -> "_State":
    """State if either of the two may have happened."""
    return _State(self.sums | other.sums, self.arrived & other.arrived)


class _Kernel:
  """Follows a kernel in program order; `found` are sums out of turn."""

  def __init__(self, warpgroups: int):
    self.all = frozenset(range(warpgroups))
    self.found: dict[Any, str] = {}
    self._arrivals: dict[Any, int] = {}  # that a barrier waits for

  def walk(self, op: Any, here: frozenset[int], state: _State) -> _State:
    """State after an operation that the warpgroups `here` may reach."""
    name = op.name
    if name in ("scf.if", "scf.index_switch"):
      return self._branch(op, here, state)
    if name in _REDUCTIONS and _crosses_warps(op):
      sums = state.sums | {(op, wg) for wg in here}
      return self._checked(dataclasses.replace(state, sums=sums))
    if name == "mosaic_gpu.initialize_barrier":
      if op.attributes["num_barriers"].value == 1:
        count = op.attributes["arrival_count"].value
        self._arrivals[_barrier(op)] = count
    elif name == "mosaic_gpu.arrive" and here == self.all:
      if self._arrivals.get(_barrier(op)) == len(self.all):
        arrived = state.arrived | {_barrier(op)}
        return dataclasses.replace(state, arrived=arrived)
    elif name == "nvvm.mbarrier.try_wait.parity" and (
      here == self.all and _barrier(op) in state.arrived
    ):
      return _State(arrived=state.arrived - {_barrier(op)})
    if len(op.regions) == 0:
      return state
    if name in _IN_SEQUENCE:
      return self._regions(op.regions, here, state)
    once = self._regions(op.regions, here, state).or_else(state)
    return self._regions(op.regions, here, once).or_else(state)

  def _regions(self, regions, here, state):
    for region in regions:
      for block in region:
        for op in block:
          state = self.walk(op.operation, here, state)
    return state

  def _branch(self, op, here, state):
    """Follows every region with the warpgroups that may take it."""
    taken: dict[int, set[int]] = {n: set() for n in range(len(op.regions))}
    for wg in here:
      value = _evaluate(op.operands[0], wg * _WARPGROUP, len(self.all))
      for n in taken if value is None else [_region(op, value)]:
        taken[n].add(wg)
    after = [
      self._regions([op.regions[n]], frozenset(wgs), state)
      for n, wgs in taken.items()
      if wgs
    ]
    first, *others = after
    for other in others:
      first = first.or_else(other)
    return self._checked(first)

  def _checked(self, state):
    if len({wg for _, wg in state.sums}) > 1:
      for op, _ in state.sums:
        wgs = sorted({wg for _, wg in state.sums})
        self.found.setdefault(
          op,
          f"warpgroups {', '.join(map(str, wgs))} may reduce "
          f"{op.operands[0].type} across warps at the same time, in the same "
          "scratch memory: let them take turns",
        )
    return state


def _region(op, value):
  """Number of the region that a branch takes for a value."""
  if op.name == "scf.if":
    return 0 if value else 1
  cases = list(op.attributes["cases"])
  return 1 + cases.index(value) if value in cases else 0  # 0 is the default


def _crosses_warps(op):
  """True if a reduction takes scratch memory."""
  if op.name == "vector.reduction" or "in_layouts" not in op.attributes:
    return True
  layout = layouts.from_layout_attr(op.attributes["in_layouts"][0])
  if not hasattr(layout, "partitioned_warp_dims"):
    return True
  return any(
    layout.tiling.tile_dimension(dimension)[warp]
    for dimension in op.attributes["reduction_dims"]
    for warp in layout.partitioned_warp_dims
  )


def _barrier(op):
  """Address of a barrier, the same for all of its operations."""
  value = op.operands[0]
  while not isinstance(value.owner, ir.Block):
    owner = value.owner
    if owner.name != "builtin.unrealized_conversion_cast":
      break
    value = owner.operands[0]
  return value


def _evaluate(value, thread, warpgroups):
  """Integer as thread `thread` computes it, None if unknown."""
  if isinstance(value.owner, ir.Block):
    return None
  op = value.owner.operation
  if op.name == "arith.constant":
    constant = op.attributes["value"]
    known = isinstance(constant, (ir.IntegerAttr, ir.BoolAttr))
    return int(constant.value) if known else None
  if op.name in ("gpu.thread_id", "gpu.block_dim"):
    if str(op.attributes["dimension"]) != "#gpu.dim<x>":
      return 0 if op.name == "gpu.thread_id" else 1
    return thread if op.name == "gpu.thread_id" else warpgroups * _WARPGROUP
  if op.name in _COPIES:
    x = _evaluate(op.operands[_COPIES[op.name]], thread, warpgroups)
    return x & 1 if x is not None and str(value.type) == "i1" else x
  if op.name != "arith.cmpi" and op.name not in _ARITHMETIC:
    return None
  x, y = (_evaluate(v, thread, warpgroups) for v in op.operands)
  if op.name == "arith.andi" and 0 in (x, y):
    return 0  # whatever the other is
  if x is None or y is None:
    return None
  if op.name == "arith.cmpi":
    return int(_COMPARISONS[op.attributes["predicate"].value](x, y))
  return _ARITHMETIC[op.name](x, y)
