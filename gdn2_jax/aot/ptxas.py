"""Resources of a kernel as ptxas prints them, and limits on them.

The messages, with their codes where ptxas gives one:

  Used N registers                        per thread
  N bytes spill stores, N bytes spill loads   registers kept in local memory
  C7510 to C7514                          wgmma is serialised: every product
                                          waits for the one before
  warning                                 anything else
  other C75..                             waits that ptxas inserts; shown only

Shared memory is dynamic and unknown to ptxas; its size stands in the launch in
Mosaic GPU's module.
"""

import dataclasses
import re
from collections.abc import Mapping

MAX_SHARED_BYTES = 232448  # 227 KiB, what one CTA may have on sm_90
_SM_SHARED_BYTES = 233472  # 228 KiB
_CTA_SHARED_BYTES = 1024  # kept back by the driver for every CTA
_SM_REGISTERS = 65536
_SM_THREADS = 2048
_SM_CTAS = 32
_PARTITIONS = 4  # of an SM; a warp and its registers live in one
_WARP_REGISTERS = 256  # granularity of a warp's registers

LIMITS = ("max_registers", "min_ctas_per_sm")

_REGISTERS = re.compile(r"Used (\d+) registers")
_MEMORY = re.compile(
  r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
)
_SPILL_WARNING = "Registers are spilled"  # repeats the figures
_SERIALIZED = re.compile(r"\(C751[0-4]\)|wgmma.*serialized")
_NOTE = re.compile(r"\(C\d{4}\)")
_WARNING = re.compile(r"\bwarning\b", re.IGNORECASE)
_THREADS = re.compile(r"\.(?:max|req)ntid\s+(\d+)(?:, *(\d+))?(?:, *(\d+))?")
_SHARED = re.compile(r"dynamic_shared_memory_size %c(\d+)")
_SCRATCH = re.compile(r"smem_scratch_bytes=(\d+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
  """Resources of one kernel."""

  registers: int  # of a thread, as the next three
  spill_stores: int
  spill_loads: int
  stack_frame: int
  threads: int  # of a CTA
  shared_bytes: int  # of a CTA
  serialized: tuple[str, ...] = ()  # lines of ptxas about wgmma
  warnings: tuple[str, ...] = ()  # its other warnings
  notes: tuple[str, ...] = ()  # its other remarks that have a code
  out_of_turn: tuple[str, ...] = ()  # found by turns.py: ptxas cannot know

  @property
  def ctas_per_sm(self) -> int:
    """CTAs that fit into an SM at a time, 0 if none does."""
    warps = -(-self.threads // 32)
    per_warp = -(-self.registers * 32 // _WARP_REGISTERS) * _WARP_REGISTERS
    partition = _SM_REGISTERS // _PARTITIONS // per_warp
    by_registers = partition * _PARTITIONS // warps
    by_shared = _SM_SHARED_BYTES // (self.shared_bytes + _CTA_SHARED_BYTES)
    return min(by_registers, by_shared, _SM_THREADS // self.threads, _SM_CTAS)


def _only(pattern: re.Pattern, text: str, what: str) -> tuple[int, ...]:
  """The numbers of the one match of a pattern."""
  found = pattern.findall(text)
  if len(found) != 1:
    raise ValueError(f"expected {what} once, found it {len(found)} times")
  groups = found[0] if isinstance(found[0], tuple) else (found[0],)
  return tuple(int(group or 1) for group in groups)


def counts(ptxas: str) -> tuple[int, ...]:
  """Registers, and bytes of stack, spill stores and spill loads."""
  registers = _only(_REGISTERS, ptxas, "'Used N registers'")
  return registers + _only(_MEMORY, ptxas, "'N bytes stack frame, ...'")


def parse(ptxas: str, ptx: str, module: str, resources: str = "") -> Usage:
  """Usage from a kernel's dumps; ValueError if a figure is missing."""
  registers, stack, stores, loads = counts(ptxas)
  x, y, z = _only(_THREADS, ptx, "'.maxntid N'")
  if _SHARED.search(module):
    (shared,) = _only(_SHARED, module, "'dynamic_shared_memory_size N'")
  else:
    # The module has no launch: Mosaic GPU's own estimate.
    (shared,) = _only(_SCRATCH, resources, "'smem_scratch_bytes=N'")
  remarks = {"serialized": [], "warnings": [], "notes": []}
  for line in map(str.strip, ptxas.splitlines()):
    if _SERIALIZED.search(line):
      remarks["serialized"].append(line)
    elif _SPILL_WARNING in line:
      continue
    elif _WARNING.search(line):
      remarks["warnings"].append(line)
    elif _NOTE.search(line):
      remarks["notes"].append(line)
  return Usage(
    registers=registers,
    spill_stores=stores,
    spill_loads=loads,
    stack_frame=stack,
    threads=x * y * z,
    shared_bytes=shared,
    **{kind: tuple(lines) for kind, lines in remarks.items()},
  )


def judge(usage: Usage, limits: Mapping[str, int]) -> list[str]:
  """Failed checks of a kernel and its own LIMITS, one sentence each."""
  found = []
  if usage.spill_stores or usage.spill_loads:
    found.append(
      f"spills registers: {usage.spill_stores} bytes stored, "
      f"{usage.spill_loads} bytes loaded"
    )
  found += [f"wgmma is serialised: {line}" for line in usage.serialized]
  found += [f"ptxas warns: {line}" for line in usage.warnings]
  found += usage.out_of_turn
  if usage.shared_bytes > MAX_SHARED_BYTES:
    found.append(
      f"{usage.shared_bytes} bytes of shared memory, a CTA has at most "
      f"{MAX_SHARED_BYTES}"
    )
  most = limits.get("max_registers")
  if most is not None and usage.registers > most:
    found.append(f"{usage.registers} registers, its budget is {most}")
  least = limits.get("min_ctas_per_sm", 1)
  if usage.ctas_per_sm < least:
    found.append(f"{usage.ctas_per_sm} CTAs per SM, its budget is {least}")
  return found
