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
    spec = Spec(
      name=name,
      **table
      | {
        key: tuple(table[key]) for key in ("branches", "chunks") & table.keys()
      },
    )
    if not 1 <= spec.warpgroups <= MAX_WARPGROUPS:
      raise ValueError(
        f"{path.name}, {name!r}: warpgroups = {spec.warpgroups}, expected 1 to "
        f"{MAX_WARPGROUPS}"
      )
    specs[name] = spec
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
    ValueError: the specification does not fit the kernel.
  """
  if ctas > 1 and spec.rounds:
    raise ValueError(
      f"ctas: {ctas}, expected 1 for {spec.name}: its CTAs walk over chunks"
    )
  if binary.threads not in (None, 128 * spec.warpgroups):
    raise ValueError(
      f"{spec.name}: warpgroups = {spec.warpgroups} in its specification, the "
      f"kernel has {binary.threads} threads"
    )
  program = read_sass(binary.listing)
  if not spec.meetings:
    for x in program:
      x.arrives = x.meets = False
  try:
    rules = branches.match_rules(program, spec.branches)
  except branches.UndecidedBranch as e:
    raise branches.UndecidedBranch(f"{spec.name}: {e}") from None
  steps = spec.chunks or (1,)
  paths = [
    [
      branches.trace(program, rules, warpgroup, chunks)
      for warpgroup in range(spec.warpgroups)
    ]
    for chunks in steps
  ]
  runs = {
    level: _per_chunk(
      [
        simulate(program, p, x, ctas=ctas, waits_for_loads=spec.waits_for_loads)
        for p in paths
      ],
      steps,
    )
    for level, x in levels.items()
  }
  opcodes = [
    [collections.Counter(program[i].base for i in path) for path in p]
    for p in paths
  ]
  floor_ms = None
  if binary.bytes_per_token_head is not None:
    moved = binary.bytes_per_token_head * assumptions.TOKEN_HEADS
    floor_ms = moved / assumptions.BANDWIDTH * 1e3
  rounds = spec.rounds or math.ceil(
    assumptions.CHUNK_HEADS / (assumptions.SMS * ctas)
  )
  cycles = {level: run.cycles for level, run in runs.items()}
  mid = runs["mid"]
  return Figures(
    name=spec.name,
    ms={
      level: max(floor_ms or 0, rounds * x / assumptions.CLOCK * 1e3)
      for level, x in cycles.items()
    },
    floor_ms=floor_ms,
    cycles=cycles,
    issue=mid.issued / ctas,
    busy={pipe: mid.busy[pipe] / ctas for pipe in assumptions.PIPES},
    code_bytes=16 * len(program),
    opcodes=[
      _difference([o[warpgroup] for o in opcodes], steps)
      for warpgroup in range(spec.warpgroups)
    ],
    waits=[
      {name: x for (n, name), x in mid.waits.items() if n == warpgroup}
      for warpgroup in range(spec.warpgroups)
    ],
    binary=binary,
  )


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
  """Counts of one chunk from those of two numbers of chunks."""
  if len(counters) == 1:
    return counters[0]
  few, many = counters
  n = steps[1] - steps[0]
  return collections.Counter({key: (many[key] - few[key]) / n for key in many})
