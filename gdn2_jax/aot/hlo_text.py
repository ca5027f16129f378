"""XLA's optimized programs, read from the text of `compiled.as_text()`."""

import dataclasses
import math
import re

_ARRAY = re.compile(r"\b(token|pred|[a-z]{1,2}\d+[a-z\d]*)\[([\d,]*)\]")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.+?) ([a-z][a-z\d\-]*)\((.*)$")
_OPERAND = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruction:
  """One line of a computation."""

  name: str
  type: str  # of its result: "bf16[4,8]{1,0}" or "(f32[], s32[2]{0})"
  opcode: str
  operands: tuple[str, ...]  # names of instructions of the same computation
  literal: str  # between the parentheses: the value of a constant
  attributes: str  # after them, metadata included
  is_root: bool

  @property
  def path(self) -> str:
    """Functions and modules that it comes from, joined by "/"."""
    return self._find(r'op_name="([^"]*)"')

  @property
  def target(self) -> str:
    """Function that a custom call calls."""
    return self._find(r'custom_call_target="([^"]*)"')

  def computation(self, attribute: str) -> str:
    """Name of the computation in an attribute such as "body", or ""."""
    return self._find(rf"\b{attribute}=%?([\w.\-]+)")

  def branches(self) -> list[str]:
    """Computations that a conditional chooses from."""
    listed = self._find(r"branch_computations=\{([^}]*)\}")
    if listed:
      return _OPERAND.findall(listed)
    return [self.computation(f"{x}_computation") for x in ("true", "false")]

  def dimensions(self, attribute: str) -> list[int]:
    """Numbers of an attribute such as lhs_contracting_dims={0,1}.

    Also of a backend's "lhs_contracting_dimensions":["0","1"].
    """
    found = self._find(rf'\b{attribute}"?[=:][\[\{{]([\d,"]*)[\]\}}]')
    return [int(n) for n in re.findall(r"\d+", found)]

  def _find(self, pattern: str) -> str:
    found = re.search(pattern, self.attributes)
    return found[1] if found else ""


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """Computations by name; the program begins with `entry`."""

  computations: dict[str, Computation]
  entry: str

  def trip_count(self, loop: Instruction) -> int:
    """Turns of a while loop, 1 if they are not known.

    The condition of a loop that counts compares with one constant.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
      return int(known[1])
    condition = self.computations[loop.computation("condition")].values()
    bounds = (
      x.literal
      for x in condition
      if x.opcode == "constant" and re.match(r"[su]\d+\[\]", x.type)
    )
    return max((int(bound) for bound in bounds), default=1)


def read_program(text: str) -> Program:
  """Reads an optimized module; ValueError without an entry computation."""
  computations: dict[str, Computation] = {}
  entry, current = "", None
  for line in text.splitlines():
    if current is None:
      # "%name (parameters) -> type {", behind "ENTRY" the first one.
      head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line.rstrip())
      if head and head[2] != "HloModule":
        current = computations.setdefault(head[2], {})
        entry = head[2] if head[1] else entry
    elif line.startswith("}"):
      current = None
    elif found := _LINE.match(line):
      instruction = _instruction(found)
      current[instruction.name] = instruction
  if not entry:
    raise ValueError("text: no ENTRY computation; expected compiled.as_text()")
  return Program(computations=computations, entry=entry)


def _instruction(found: re.Match) -> Instruction:
  root, name, type_, opcode, rest = found.groups()
  inside, attributes = _split_parenthesis(rest)
  return Instruction(
    name=name,
    type=type_,
    opcode=opcode,
    operands=tuple(_OPERAND.findall(inside)),
    literal=inside,
    attributes=attributes,
    is_root=bool(root),
  )


def _split_parenthesis(text: str) -> tuple[str, str]:
  """Text up to the closing parenthesis of an open one, and the rest."""
  depth = 1
  for i, c in enumerate(text):
    depth += (c == "(") - (c == ")")
    if not depth:
      return text[:i], text[i + 1 :]
  return text, ""


def arrays(type_: str) -> list[tuple[str, tuple[int, ...]]]:
  """Element type and shape of every array of a type."""
  return [
    (element, tuple(int(n) for n in dims.split(",") if n))
    for element, dims in _ARRAY.findall(type_)
  ]


def shape_of(type_: str) -> tuple[int, ...]:
  """Shape of the first array of a type."""
  return arrays(type_)[0][1]


def bytes_of(type_: str) -> int:
  """Bytes of all arrays of a type."""
  return sum(array_bytes(*array) for array in arrays(type_))


def array_bytes(element: str, shape: tuple[int, ...]) -> int:
  """Bytes of one array; elements smaller than a byte are packed."""
  bits = {"token": 0, "pred": 8}.get(element)
  if bits is None:
    bits = int(re.findall(r"\d+", element)[0])  # as in f8e4m3fn
  return -(-math.prod(shape) * bits // 8)
