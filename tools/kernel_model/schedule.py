"""Simulation of one scheduler of an SM.

It has one warp of every warpgroup, issues their instructions in order, at most
one a cycle, and takes the warp that can issue first; of several, the one that
issued longest ago.
"""

import collections
import dataclasses
import re
from collections.abc import Sequence

from tools.kernel_model import assumptions
from tools.kernel_model.assumptions import Latencies
from tools.kernel_model.sass import NO_BOARD, Instruction

_WIDTH = re.compile(r"HGMMA\.\d+x(\d+)x")


@dataclasses.dataclass(frozen=True)
class Run:
  """Result of a simulation, in cycles of a scheduler.

  Attributes:
    cycles: from the first instruction to the end of the last.
    issued: number of instructions.
    busy: by pipe.
    waits: by warpgroup and reason.
  """

  cycles: float
  issued: float
  busy: collections.Counter[str]
  waits: collections.Counter[tuple[int, str]]


def simulate(
  program: Sequence[Instruction],
  paths: Sequence[Sequence[int]],
  latencies: Latencies,
  *,
  ctas: int = 1,
  waits_for_loads: bool = True,
) -> Run:
  """Issues the instructions of all warps and counts cycles.

  Args:
    program: instructions of the kernel.
    paths: for every warpgroup, indices of the instructions that it executes.
    latencies: assumed cycles.
    ctas: number of CTAs on the SM.
    waits_for_loads: False if loads are issued so early that waits for TMA and
      global memory take no time.

  Raises:
    ValueError: a warpgroup waits at a meeting that the others never reach.
  """
  scheduler = _Scheduler(program, paths, latencies, ctas, waits_for_loads)
  while scheduler.warps:
    scheduler.step()
  return Run(
    scheduler.end, scheduler.issued, scheduler.busy, scheduler.mean_waits()
  )


class _Warp:
  """One warp and what it waits for; times in cycles."""

  def __init__(self, cta: int, warpgroup: int, path: Sequence[int]):
    self.cta, self.warpgroup, self.path = cta, warpgroup, path
    self.position = 0  # in the path
    self.meetings = 0  # that it has arrived at
    self.last = -1.0  # issue of its last instruction
    self.ready = 0.0  # by stall counts
    self.boards = [0.0] * 6  # scoreboards: last completion
    self.products = 0.0  # end of its wgmma
    self.loaded = 0.0  # end of its TMA loads
    self.stored = 0.0  # shared memory read by its TMA stores


class _Scheduler:
  """State of the pipes and of all warps that have not ended."""

  def __init__(self, program, paths, latencies, ctas, waits_for_loads):
    self.program, self.ctas, self.groups = program, ctas, len(paths)
    self.assumed, self.waits_for_loads = latencies, waits_for_loads
    self.latencies = assumptions.latencies_of(latencies, waits_for_loads)
    self.distances = assumptions.least_distances(latencies)
    self.warps = [
      _Warp(cta, warpgroup, path)
      for cta in range(ctas)
      for warpgroup, path in enumerate(paths)
    ]
    self.pipes = collections.defaultdict(float)  # free from this time on
    self.tensor = 0.0  # end of all products
    self.arrivals = collections.defaultdict(list)  # times, by CTA and meeting
    self.clock, self.end, self.issued = -1.0, 0.0, 0
    self.busy, self.waits = collections.Counter(), collections.Counter()

  def step(self) -> None:
    """Issues the next instruction."""
    best, candidate = None, None
    for warp in self.warps:
      x = self.program[warp.path[warp.position]]
      found = self._earliest(warp, x)
      if found is None:
        continue
      order = max(found[0], self.clock + 1), warp.last
      if best is None or order < best:
        best, candidate = order, (warp, x, *found)
    if candidate is None:
      raise ValueError(
        "a warpgroup waits at a meeting that the others never reach; are these "
        "barriers of producers and consumers (meetings = false)?"
      )
    warp, x, when, reason = candidate
    time = best[0]
    self.waits[warp.warpgroup, reason] += when - warp.ready
    self.waits[warp.warpgroup, "issue"] += time - when
    self._issue(warp, x, time)

  def mean_waits(self) -> collections.Counter:
    """Waits of a warpgroup, as a mean over CTAs."""
    waits = {key: cycles / self.ctas for key, cycles in self.waits.items()}
    return collections.Counter(waits)

  def _earliest(self, warp, x):
    """Time of issue and the reason for it; None if it is not known yet."""
    when, reason = warp.ready, "fixed"
    for board in x.waits:
      if warp.boards[board] > when:
        when, reason = warp.boards[board], "scoreboard"
    for time, name in self._own_waits(warp, x):
      if time is None:
        return None
      if time > when:
        when, reason = time, name
    if x.pipe and self.pipes[x.pipe] > when:
      when, reason = self.pipes[x.pipe], x.pipe
    return when, reason

  def _own_waits(self, warp, x):
    """Times that instructions which are waits themselves wait for."""
    if x.op.startswith("WARPGROUP.DEPBAR"):
      yield warp.products, "wgmma"
    elif x.meets:
      times = self.arrivals[warp.cta, warp.meetings]
      complete = len(times) == self.groups
      yield max(times) + self.assumed.sync if complete else None, "meeting"
    elif not self.waits_for_loads:
      return
    elif x.op.startswith("SYNCS.PHASECHK"):
      yield warp.loaded, "TMA load"
    elif x.base == "DEPBAR":
      yield warp.stored, "TMA store"

  def _issue(self, warp, x, time):
    self.clock = warp.last = time
    if x.pipe:
      self.pipes[x.pipe] = time + x.busy
      self.busy[x.pipe] += x.busy
    latency = self.latencies.get(x.base, self.assumed.other)
    part = self.assumed.read_part
    if x.base == "HGMMA":
      latency, part = self._product(warp, x, time), 1
    elif x.base in assumptions.TMA_LOADS:
      warp.loaded = time + self.assumed.tma
    elif x.base == "UTMASTG":
      read = time + self.assumed.store_part * self.assumed.tma
      warp.stored = max(warp.stored, read)
    for board, cycles in ((x.write, latency), (x.read, part * latency)):
      if board != NO_BOARD:
        warp.boards[board] = max(warp.boards[board], time + cycles)
    if x.arrives:
      warp.meetings += 1
      self.arrivals[warp.cta, warp.meetings].append(time)
    least, reason = self.distances.get(x.base, (1, "fixed"))
    pause = max(x.stall, least)
    self.waits[warp.warpgroup, reason] += pause - 1
    warp.ready = time + pause
    self.end = max(self.end, warp.ready)
    self.issued += 1
    warp.position += 1
    if warp.position == len(warp.path):
      self.warps.remove(warp)

  def _product(self, warp, x, time):
    """Queues a wgmma of 64 x N x 16; cycles until its scoreboards are free."""
    n = int(_WIDTH.match(x.op)[1])
    cycles = n / 64 * self.assumed.gmma_cycles
    a = x.text.split(",")[1].strip()
    if a.startswith("gdesc"):  # shared memory, as B always is
      cycles += n / 64 * self.assumed.gmma_shared
      operands = (64 + n) * 16 * 2  # bytes
      cycles = max(cycles, operands / self.assumed.gmma_bytes)
    self.tensor = max(self.tensor, time + self.assumed.gmma_start) + cycles
    self.busy["tensor"] += cycles
    warp.products = max(warp.products, self.tensor + self.assumed.gmma)
    # Registers of A are free when the product is done.
    return (self.tensor if a.startswith("R") else warp.products) - time
