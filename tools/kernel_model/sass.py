"""Instructions and control bits of machine code (SASS).

`nvdisasm -hex` prints an instruction of Hopper with its 128 bits. The compiler
schedules by control bits, in the high 64 of them:

  41-44  cycles to the next instruction of the warp (stall count)
  46-48  scoreboard that is freed when the result is there, 7 for none
  49-51  scoreboard that is freed when the operands are read, 7 for none
  52-57  scoreboards to wait for before issue, as a mask
"""

import dataclasses
import re

from tools.kernel_model.assumptions import pipe_of

NO_BOARD = 7
_LABEL = re.compile(r"(\.L_x_\d+):")
_LOW = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(.*?);\s+/\* 0x[0-9a-f]+ \*/")
_HIGH = re.compile(r"\s+/\* 0x([0-9a-f]+) \*/")
_PREDICATE = re.compile(r"(@!?U?P\w+)\s+(.*)")
_UNFOLLOWED = ("BRX", "JMP", "JMX", "CALL", "RET")


@dataclasses.dataclass(slots=True)
class Instruction:
  """One instruction.

  Attributes:
    text: without its predicate.
    predicate: "@P0", "@!UP1" or "".
    op: opcode with its modifiers.
    base: opcode alone.
    stall: cycles to the next instruction of the warp.
    write: scoreboard that it frees with its result.
    read: scoreboard that it frees when its operands are read.
    waits: scoreboards that it waits for.
    pipe: what it occupies, "" for none.
    busy: cycles of a scheduler that it occupies the pipe.
    target: index that a branch goes to, -1 if it is no branch.
    arrives: a warpgroup's arrival at a meeting.
    meets: the wait for the others at a meeting.
  """

  text: str
  predicate: str
  op: str
  base: str
  stall: int
  write: int
  read: int
  waits: tuple[int, ...]
  pipe: str
  busy: int
  target: int = -1
  arrives: bool = False
  meets: bool = False

  def __str__(self):
    return f"{self.predicate} {self.text}".strip()


def decode(text: str, high: int) -> Instruction:
  """Instruction of its text and its high 64 bits."""
  predicate = ""
  if guarded := _PREDICATE.match(text):
    predicate, text = guarded.groups()
  op = text.split()[0]
  pipe, busy = pipe_of(op)
  mask = high >> 52 & 63
  return Instruction(
    text=text,
    predicate=predicate,
    op=op,
    base=op.split(".")[0],
    stall=high >> 41 & 15,
    write=high >> 46 & 7,
    read=high >> 49 & 7,
    waits=tuple(n for n in range(6) if mask >> n & 1),
    pipe=pipe,
    busy=busy,
  )


def read_sass(listing: str) -> list[Instruction]:
  """Instructions of `nvdisasm -hex -c` of one kernel, in the order of the code.

  Raises:
    ValueError: there is no instruction, a branch goes to an unknown label, or
      the code has calls or computed branches, which cannot be followed.
  """
  program, labels, pending = [], {}, None
  for line in listing.splitlines():
    if label := _LABEL.match(line):
      labels[label[1]] = len(program)
    elif low := _LOW.match(line):
      pending = low[1].strip()
    elif pending and (high := _HIGH.match(line)):
      program.append(decode(pending, int(high[1], 16)))
      pending = None
  if not program:
    raise ValueError("no instruction, expected the output of nvdisasm -hex -c")
  _find_targets(program, labels)
  _find_meetings(program)
  return program


def _find_targets(program, labels):
  for x in program:
    if x.base in _UNFOLLOWED:
      raise ValueError(f"{x}: calls and computed branches cannot be followed")
    if x.base != "BRA":
      continue
    label = re.search(r"\.L_x_\d+", x.text)
    if label is None or label[0] not in labels:
      raise ValueError(f"{x}: expected a label of the code")
    x.target = labels[label[0]]
    condition = x.text.split()[1].strip(",")  # BRA.U UP0, label
    if condition.startswith(("P", "UP", "!")):
      x.predicate = x.predicate or f"@{condition}"


def _find_meetings(program):
  """Marks arrivals without bytes, and the wait that follows each."""
  arrived = False
  for x in program:
    if x.op.startswith("SYNCS.ARRIVE.TRANS64.A1T0"):
      x.arrives = arrived = True
    elif arrived and x.op.startswith("SYNCS.PHASECHK") and "TRYWAIT" in x.op:
      x.meets, arrived = True, False
