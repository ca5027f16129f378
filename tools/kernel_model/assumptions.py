"""All assumptions of the model: the chip, its pipes, its latencies.

Times are cycles of a scheduler, of which a streaming multiprocessor (SM) has
four. README.md says what each rests on.
"""

import dataclasses

BAND = 0.25  # of every time, either way; a judgement, see README.md

SMS = 132  # of an H100 SXM
CLOCK = 1.755e9  # Hz
BANDWIDTH = 3.0e12  # bytes/s of global memory

# The shape that times are given for.
BATCH, TOKENS, HEADS, CHUNK = 8, 2048, 16, 64
TOKEN_HEADS = BATCH * TOKENS * HEADS
CHUNK_HEADS = TOKEN_HEADS // CHUNK


@dataclasses.dataclass(frozen=True)
class Latencies:
  """Cycles that the control bits of an instruction leave open."""

  lds: float  # load from shared memory
  ldsm: float  # load of matrices from shared memory
  mufu: float  # exponential, reciprocal; conversions of the XU pipe
  shfl: float  # exchange between lanes
  r2ur: float  # vector register to uniform register
  other: float  # everything else that has a scoreboard
  bar: float  # barrier of the warps of one warpgroup
  sync: float  # mbarrier: arrival; last arrival to the end of a wait
  fence: float  # memory fence
  gmma: float  # end of a group of wgmma to the end of the wait for it
  gmma_cycles: float  # tensor core, for a product of 64 x 64 x 16
  gmma_shared: float  # the same, added where A is in shared memory
  gmma_bytes: float  # per cycle and SM, read by such a product: A and B
  ld: float  # load from global memory
  tma: float  # TMA load to its mbarrier
  utma: float  # TMA instruction to the release of its registers
  st: float = 20  # store to global memory to the release of its registers
  special: float = 30  # special registers, constants by an index
  atoms: float = 60  # atomic operation on shared memory
  early_ld: float = 40  # load from global memory in time: waits_for_loads

  # Parts of the above.
  sts_part: float = 0.6  # of lds: store to the release of its registers
  read_part: float = 0.5  # of a latency: until the operands are read
  store_part: float = 0.7  # of tma: TMA store until shared memory is read

  # Least distance to the next instruction of the warp, beside the stall count.
  branch: float = 10
  gmma_start: float = 8  # wgmma until the tensor core starts


LEVELS = {
  "low": Latencies(
    lds=26,
    ldsm=30,
    mufu=18,
    shfl=22,
    r2ur=8,
    other=10,
    bar=18,
    sync=16,
    fence=12,
    gmma=28,
    gmma_cycles=32,
    gmma_shared=0,
    gmma_bytes=512,
    ld=600,
    tma=700,
    utma=4,
  ),
  "mid": Latencies(
    lds=29,
    ldsm=33,
    mufu=22,
    shfl=25,
    r2ur=10,
    other=12,
    bar=26,
    sync=24,
    fence=24,
    gmma=45,
    gmma_cycles=32,
    gmma_shared=0,
    gmma_bytes=128,
    ld=800,
    tma=900,
    utma=8,
  ),
  "high": Latencies(
    lds=33,
    ldsm=38,
    mufu=30,
    shfl=30,
    r2ur=12,
    other=16,
    bar=36,
    sync=34,
    fence=40,
    gmma=70,
    gmma_cycles=36,
    gmma_shared=6,
    gmma_bytes=128,
    ld=1100,
    tma=1200,
    utma=16,
  ),
}
LATENCY_NAMES = [field.name for field in dataclasses.fields(Latencies)]

# Busy cycles of a pipe for one instruction of a warp; by opcode, without its
# modifiers. Of ALU, IMAD and XU: 32 lanes over 16, 16 and 4 units.
_ALU = (
  *("LOP3", "ISETP", "SEL", "FSEL", "FMNMX", "IADD3", "SHF", "LEA", "PRMT"),
  *("VIADD", "PLOP3", "F2FP", "P2R", "R2P", "FSETP", "VIMNMX", "IMNMX", "VOTE"),
  *("POPC", "FCHK", "BMSK", "SGXT", "IABS", "R2UR"),
)
_FMA = ("FADD", "FMUL", "FFMA", "HFMA2", "HADD2", "HMUL2", "MOV", "CS2R")
_XU = ("MUFU", "F2F", "I2F", "F2I", "FRND", "I2FP", "F2IP")
_GLOBAL = ("LD", "LDG", "ST", "STG", "LDGSTS")
TMA_LOADS = ("UTMALDG", "UBLKCP")
TMA = (*TMA_LOADS, "UTMASTG", "UTMACCTL", "UTMACMDFLUSH")
_PIPES = {
  **dict.fromkeys(_ALU, ("ALU", 2)),
  **dict.fromkeys(_FMA, ("FMA", 1)),
  **dict.fromkeys(_XU, ("XU", 8)),
  **dict.fromkeys(_GLOBAL, ("MIO", 8)),
  "IMAD": ("IMAD", 2),
  "SHFL": ("MIO", 4),
  "HGMMA": ("queue", 1),  # the tensor core's own time: schedule.py
  "HMMA": ("tensor", 8),
}
PIPES = ("ALU", "FMA", "IMAD", "XU", "MIO", "uniform", "tensor")  # as shown


def pipe_of(op: str) -> tuple[str, int]:
  """Pipe of an opcode with its modifiers and its busy cycles; "", 0 if none.

  Shared memory moves 32 bytes a cycle and scheduler: 4 cycles for 4 bytes of
  each lane, or for an 8 x 8 matrix of 16 bits.
  """
  base, *modifiers = op.split(".")
  if base in ("LDS", "STS"):
    return "MIO", 16 if "128" in modifiers else 8 if "64" in modifiers else 4
  if base in ("LDSM", "STSM"):
    return "MIO", 4 * int(op[-1]) if op[-1].isdigit() else 4
  if base in _PIPES:
    return _PIPES[base]
  if base.startswith("U") and base not in TMA:
    return "uniform", 2
  return "", 0


def latencies_of(x: Latencies, waits_for_loads: bool) -> dict[str, float]:
  """Cycles from issue to result, by opcode; all others take `x.other`."""
  return {
    **dict.fromkeys(("MUFU", "F2F", "F2I", "I2F"), x.mufu),
    **dict.fromkeys(("STS", "STSM"), x.sts_part * x.lds),
    **dict.fromkeys(("S2R", "S2UR", "CS2R", "LDC"), x.special),
    **dict.fromkeys(("LD", "LDG"), x.ld if waits_for_loads else x.early_ld),
    **dict.fromkeys(("ST", "STG", "LDGSTS"), x.st),
    **dict.fromkeys((*TMA_LOADS, "UTMASTG"), x.utma),
    "LDS": x.lds,
    "LDSM": x.ldsm,
    "SHFL": x.shfl,
    "R2UR": x.r2ur,
    "SYNCS": x.sync,
    "ATOMS": x.atoms,
  }


def least_distances(x: Latencies) -> dict[str, tuple[float, str]]:
  """Least cycles to the next instruction by opcode, and what they wait for."""
  return {
    "BAR": (x.bar, "bar"),
    "MEMBAR": (x.fence, "fence"),
    "FENCE": (x.fence, "fence"),
    "BRA": (x.branch, "fixed"),
  }
