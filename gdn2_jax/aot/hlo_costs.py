"""FLOPs and bytes of every launch of an optimized program.

An instruction of the entry computation that is no view of its operands launches
a kernel, as often as the loops around it turn; of a conditional every branch
counts. Bytes are those of operands and results, each once: caches and what
several blocks read twice are left out. What only looks at slices of an operand
reads the slices; what updates an operand in place writes the update. FLOPs are
those of matrix products, also inside fusions; kernels of our own count none.
"""

import dataclasses
import math
from collections.abc import Iterator

from gdn2_jax.aot.hlo_text import (
  Computation,
  Instruction,
  Program,
  array_bytes,
  arrays,
  bytes_of,
  shape_of,
)

_VIEWS = (
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
  *("opt-barrier", "add-dependency", "after-all", "partition-id", "replica-id"),
)
_SLICES = {"dynamic-slice", "slice"}
_IN_PLACE = "dynamic-update-slice"
_FUSIONS = ("fusion", "fusion-start", "async-start")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
  """One instruction that launches a kernel; costs of one launch."""

  name: str
  opcode: str
  type: str  # of its result
  path: str  # names of the functions and modules that it comes from
  target: str  # of a custom call, else ""
  times: int  # launches in a run of the program
  flops: int  # of matrix products
  read: int  # bytes
  written: int  # bytes


def launches(program: Program, start: str = "") -> list[Launch]:
  """Launches of a program, or of a computation of it, in the text's order."""
  return list(_walk(program, start or program.entry, 1))


def loop_bodies(program: Program) -> list[str]:
  """Bodies of the loops that the program itself runs, not of those inside."""
  entry = program.computations[program.entry].values()
  return [x.computation("body") for x in entry if x.opcode == "while"]


def _walk(program: Program, name: str, times: int) -> Iterator[Launch]:
  computation = program.computations[name]
  for x in computation.values():
    # What ends an asynchronous operation moves nothing itself.
    if x.opcode in _VIEWS or x.opcode.endswith(("-done", "-update")):
      continue
    match x.opcode:
      case "while":
        turns = program.trip_count(x)
        yield from _walk(program, x.computation("body"), times * turns)
      case "call":
        yield from _walk(program, x.computation("to_apply"), times)
      case "conditional":
        for branch in x.branches():
          yield from _walk(program, branch, times)
      case _:
        yield _launch(program, computation, x, times)


def _launch(
  program: Program, computation: Computation, x: Instruction, times: int
) -> Launch:
  path, target = x.path, x.target
  read, written = _moved(program, computation, x)
  if x.opcode in _FUSIONS:
    for y in program.computations[x.computation("calls")].values():
      if y.opcode == "custom-call":
        path, target = y.path or path, y.target
  return Launch(
    name=x.name,
    opcode=x.opcode,
    type=x.type,
    path=path,
    target=target,
    times=times,
    flops=_flops(program, computation, x),
    read=read,
    written=written,
  )


def _flops(program: Program, computation: Computation, x: Instruction) -> int:
  """Multiplications and additions of the matrix products of one launch."""
  if x.opcode in _FUSIONS:
    body = program.computations[x.computation("calls")]
    return sum(_flops(program, body, y) for y in body.values())
  if x.opcode == "dot":
    contracted = x.dimensions("lhs_contracting_dims")
  elif x.opcode == "custom-call" and "cublas" in x.target:
    contracted = x.dimensions("lhs_contracting_dimensions")
  else:
    return 0
  left = shape_of(computation[x.operands[0]].type)
  sums, terms = _results(x)[0][1], [left[d] for d in contracted]
  return 2 * math.prod(sums) * math.prod(terms)


def _results(x: Instruction) -> list[tuple[str, tuple[int, ...]]]:
  """Arrays of a result, without cuBLAS's workspace of signed bytes."""
  found = arrays(x.type)
  if "cublas" in x.target:
    found = [array for array in found if array[0] != "s8"] or found
  return found


def _moved(
  program: Program, computation: Computation, x: Instruction
) -> tuple[int, int]:
  """Bytes that one launch reads and writes."""
  if x.opcode in _FUSIONS:
    body = program.computations[x.computation("calls")]
    root = next(y for y in body.values() if y.is_root)
    parameters = (y for y in body.values() if y.opcode == "parameter")
    return sum(_read(body, y) for y in parameters), _written(body, root)
  written = bytes_of(x.type)
  match x.opcode:
    case "dynamic-update-slice":
      update = bytes_of(computation[x.operands[1]].type)
      return update, update
    case "dynamic-slice" | "slice":
      return written, written
    case "copy-start":  # its result names the source as well
      source = array_bytes(*arrays(x.type)[0])
      return source, source
    case "broadcast":
      return 0, written
    case "custom-call":
      written = sum(array_bytes(*array) for array in _results(x))
  operands = (computation[name].type for name in x.operands)
  return sum(map(bytes_of, operands)), written


def _read(body: Computation, parameter: Instruction) -> int:
  """Bytes of a fusion's operand that the fusion reads."""
  whole, uses = bytes_of(parameter.type), list(_uses(body, parameter.name))
  # As an index or as an update it is read whole.
  opcodes = {user.opcode if first else "" for user, first in uses}
  if opcodes and (
    opcodes <= _SLICES | {"gather"} or opcodes <= _SLICES | {_IN_PLACE}
  ):
    slices = (user for user, _ in uses if user.opcode != _IN_PLACE)
    return min(whole, sum(bytes_of(user.type) for user in slices))
  return 0 if opcodes == {"scatter"} else whole


def _uses(body: Computation, name: str) -> Iterator[tuple[Instruction, bool]]:
  """Users of a value or of its views; True where it is the first operand."""
  for user in body.values():
    for operand in user.operands:
      if operand != name:
        continue
      if user.opcode == "bitcast":
        yield from _uses(body, user.name)
      else:
        yield user, user.operands[0] == name


def _written(body: Computation, x: Instruction) -> int:
  """Bytes that a fusion writes for a value of its root."""
  match x.opcode:
    case "tuple":
      return sum(_written(body, body[name]) for name in x.operands)
    case "bitcast":
      return _written(body, body[x.operands[0]])
    case "dynamic-update-slice":
      return bytes_of(body[x.operands[1]].type)
    case "scatter":  # reads and writes what it adds to
      return 2 * bytes_of(body[x.operands[2]].type)
  return bytes_of(x.type)
