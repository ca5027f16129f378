"""Figures of one kernel: its specification, and cycles per chunk-head."""

import collections
import dataclasses
import math
import pathlib
import tomllib
from collections.abc import Mapping, Sequence

from tools.kernel_model import assumptions, branches
from tools.kernel_model.assumptions import LEVELS, Latencies
from tools.kernel_model.sass import read_sass
from tools.kernel_model.schedule import Run, simulate

MAX_WARPGROUPS = 8
INSTRUCTION_BYTES = 16
SPECS = pathlib.Path(__file__).with_name("specs.toml")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
  """Branches and launch of a kernel; a table of specs.toml."""

  name: str  # of the case in gdn2_jax.aot.cases
  branches: tuple[str, ...]  # rules, see branches.is_taken
  warpgroups: int = 2
  chunks: tuple[int, int] | None = None  # of a kernel that walks over chunks
  rounds: int | None = None  # chunk-heads that an SM takes one after another
  waits_for_loads: bool = True
  meetings: bool = True  # barriers without bytes are met by all warpgroups

  def __post_init__(self):
    if not 1 <= self.warpgroups <= MAX_WARPGROUPS:
      raise ValueError(
        f"{self.name}: warpgroups = {self.warpgroups}, expected 1 to "
        f"{MAX_WARPGROUPS}"
      )
    match self.chunks:
      case None:
        pass
      case [few, many] if 1 <= few < many:
        pass
      case _:
        raise ValueError(
          f"{self.name}: chunks = {list(self.chunks)}, expected two numbers of "
          "chunks, the second the larger"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Binary:
  """A compiled kernel: its listing and resources, None where unknown."""

  listing: str  # of nvdisasm -hex -c
  bytes_per_token_head: float | None = None  # of operands and results
  threads: int | None = None
  registers: int | None = None
  spills: int | None = None  # bytes stored and loaded by a thread
  shared_bytes: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
  """Modelled figures of a kernel.

  Attributes:
    name: of the case.
    ms: by level.
    floor_ms: of its bytes, None where they are unknown.
    cycles: of one chunk-head, by level.
    issue: issue slots taken by one chunk-head, at the level "mid".
    busy: the same for busy cycles, by pipe.
    code_bytes: size of the code.
    opcodes: executed instructions by warpgroup and opcode.
    waits: cycles by warpgroup and reason.
    binary: the kernel.
  """

  name: str
  ms: Mapping[str, float]
  floor_ms: float | None
  cycles: Mapping[str, float]
  issue: float
  busy: Mapping[str, float]
  code_bytes: int
  opcodes: Sequence[Mapping[str, float]]
  waits: Sequence[Mapping[str, float]]
  binary: Binary


def load_specs(path: pathlib.Path = SPECS) -> dict[str, Spec]:
  """Specifications by the name of the case, in the order of the file.

  Raises:
    ValueError: a table has no branches, or an unknown key.
  """
  known = {field.name for field in dataclasses.fields(Spec)} - {"name"}
  specs = {}
  for name, table in tomllib.loads(path.read_text()).items():
    unknown = sorted(set(table) - known)
    if unknown or "branches" not in table:
      what = f"unknown keys {unknown}" if unknown else "no branches"
      raise ValueError(
        f"{path.name}, {name!r}: {what}, expected branches and any of "
        f"{sorted(known - {'branches'})}"
      )
    table["branches"] = tuple(table["branches"])
    if "chunks" in table:
      table["chunks"] = tuple(table["chunks"])
    specs[name] = Spec(name=name, **table)
  return specs


def model(
  spec: Spec,
  binary: Binary,
  *,
  levels: Mapping[str, Latencies] = LEVELS,
  ctas: int = 1,
) -> Figures:
  """Models a kernel at every level of assumptions.

  Args:
    spec: its branches and launch.
    binary: the kernel.
    levels: assumed latencies, by level; "mid" among them.
    ctas: CTAs on an SM at a time.

  Raises:
    UndecidedBranch: the rules do not fit the branches.
    ValueError: the specification does not fit the kernel otherwise.
  """
  _check(spec, binary, ctas)
  program = read_sass(binary.listing)
  if not spec.meetings:
    for x in program:
      x.arrives = x.meets = False
  steps = spec.chunks or (1,)
  paths = _paths(spec, program, steps)
  loads = spec.waits_for_loads
  runs = {
    level: _per_chunk(
      [
        simulate(program, p, x, ctas=ctas, waits_for_loads=loads) for p in paths
      ],
      steps,
    )
    for level, x in levels.items()
  }
  cycles = {level: run.cycles for level, run in runs.items()}
  floor_ms = None
  if binary.bytes_per_token_head is not None:
    moved = binary.bytes_per_token_head * assumptions.TOKEN_HEADS
    floor_ms = moved / assumptions.BANDWIDTH * 1e3
  groups, mid = range(spec.warpgroups), runs["mid"]
  return Figures(
    name=spec.name,
    ms={
      level: max(
        floor_ms or 0, _rounds(spec, ctas) * x / assumptions.CLOCK * 1e3
      )
      for level, x in cycles.items()
    },
    floor_ms=floor_ms,
    cycles=cycles,
    issue=mid.issued / ctas,
    busy={pipe: mid.busy[pipe] / ctas for pipe in assumptions.PIPES},
    code_bytes=INSTRUCTION_BYTES * len(program),
    opcodes=[_opcodes(program, paths, steps, wg) for wg in groups],
    waits=[
      {name: x for (n, name), x in mid.waits.items() if n == wg}
      for wg in groups
    ],
    binary=binary,
  )


def _check(spec, binary, ctas):
  if ctas < 1 or (ctas > 1 and spec.rounds):
    raise ValueError(
      f"ctas: {ctas}, expected at least 1, and 1 for {spec.name} if its CTAs "
      "walk over chunks"
    )
  if binary.threads not in (None, 128 * spec.warpgroups):
    raise ValueError(
      f"{spec.name}: warpgroups = {spec.warpgroups}, expected the "
      f"{binary.threads} threads of the kernel over 128"
    )


def _rounds(spec, ctas):
  """Chunk-heads that an SM takes one after another."""
  waves = math.ceil(assumptions.CHUNK_HEADS / (assumptions.SMS * ctas))
  return spec.rounds or waves


def _paths(spec, program, steps):
  """For every number of chunks, the path of every warpgroup."""
  try:
    rules = branches.match_rules(program, spec.branches)
  except branches.UndecidedBranch as e:
    raise branches.UndecidedBranch(f"{spec.name}: {e}") from None
  return [
    [
      branches.trace(program, rules, warpgroup, chunks)
      for warpgroup in range(spec.warpgroups)
    ]
    for chunks in steps
  ]


def _opcodes(program, paths, steps, warpgroup):
  """Opcodes that a warpgroup executes for one chunk."""
  counters = [
    collections.Counter(program[i].base for i in path[warpgroup])
    for path in paths
  ]
  return _difference(counters, steps)


def _per_chunk(runs: list[Run], steps: tuple[int, ...]) -> Run:
  """Run of one chunk: of two numbers of chunks, without start and end."""
  if len(runs) == 1:
    return runs[0]
  few, many = runs
  n = steps[1] - steps[0]
  return Run(
    (many.cycles - few.cycles) / n,
    (many.issued - few.issued) / n,
    _difference([few.busy, many.busy], steps),
    _difference([few.waits, many.waits], steps),
  )


def _difference(counters, steps):
  """Counts of one chunk from those of one or two numbers of chunks."""
  if len(counters) == 1:
    return counters[0]
  few, many = counters
  n = steps[1] - steps[0]
  return collections.Counter({key: (many[key] - few[key]) / n for key in many})
