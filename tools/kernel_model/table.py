"""Rows of the table: kernels, their sums, and the comparison with a record."""

import datetime
import json
import pathlib
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from tools.kernel_model import assumptions
from tools.kernel_model.assumptions import LEVELS
from tools.kernel_model.kernel import Figures

MAX_SLOWER = 0.05  # of the cycles of a record, at the level "mid"
FLA = pathlib.Path(__file__).with_name("fla.toml")
WHAT = (
  "modelled, not measured: cycles of the compiled machine code on one "
  "scheduler of an H100 (tools/kernel_model/README.md); no GPU was used"
)
# Kernels that run one after another.
SUMS = {
  "forward": ("intra", "scan"),
  "forward and backward": (
    *("intra", "scan, states saved"),
    *("intra, A given", "scan_grad", "intra_grad"),
  ),
  "forward, gates": ("intra, gates", "scan, gates"),
  "forward and backward, gates": (
    *("intra, gates", "scan, gates, states saved"),
    *("intra, gates, A given", "scan_grad", "intra_grad, gates"),
  ),
  "forward, 1 x 16384": (
    *("intra", "section transitions", "section ends", "section chain"),
    "scan T=16384, sections",
  ),
}
_COLUMNS = ("issue", "ALU", "FMA", "XU", "MIO", "tensor")


def row_of(figures: Figures) -> dict[str, Any]:
  """JSON values of a kernel; cycles are those of one chunk-head."""
  binary = figures.binary
  return {
    "name": figures.name,
    **{f"ms_{level}": round(x, 4) for level, x in figures.ms.items()},
    "floor_ms": None
    if figures.floor_ms is None
    else round(figures.floor_ms, 4),
    "cycles": {level: round(x, 1) for level, x in figures.cycles.items()},
    "issue": round(figures.issue, 1),
    "busy_cycles": {pipe: round(x, 1) for pipe, x in figures.busy.items()},
    "registers": binary.registers,
    "spills": binary.spills,
    "threads": binary.threads,
    "shared_bytes": binary.shared_bytes,
    "code_bytes": figures.code_bytes,
    "bytes_per_token_head": binary.bytes_per_token_head,
  }


def sums_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Rows of SUMS, of those whose kernels are all there."""
  by_name = {row["name"]: row for row in rows}
  keys = [*(f"ms_{level}" for level in LEVELS), "floor_ms"]
  return [
    {
      "name": name,
      **{k: round(sum(by_name[part][k] for part in parts), 4) for k in keys},
      "kernels": list(parts),
    }
    for name, parts in SUMS.items()
    if set(parts) <= set(by_name)
    and all(by_name[part]["floor_ms"] is not None for part in parts)
  ]


def record_of(
  rows: Sequence[Mapping[str, Any]], versions: Mapping[str, str]
) -> dict[str, Any]:
  """A table with everything that its figures depend on.

  Args:
    rows: of kernels.
    versions: of jax, ptxas and nvdisasm.
  """
  return {
    "what": WHAT,
    "band": f"+-{assumptions.BAND:.0%} of every time, a judgement; between two "
    "versions of one kernel it is narrower",
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    **versions,
    "shape": {
      "batch": assumptions.BATCH,
      "tokens": assumptions.TOKENS,
      "heads": assumptions.HEADS,
      "chunk": assumptions.CHUNK,
      "K": 128,
      "V": 128,
      "dtype": "bfloat16",
      "T=16384": "batch 1, 16384 tokens",
    },
    "assumptions": _assumptions(),
    "rows": [*rows, *sums_of(rows)],
    "fla": tomllib.loads(FLA.read_text()),
  }


def _assumptions():
  return {
    "sms": assumptions.SMS,
    "clock_hz": assumptions.CLOCK,
    "bytes_per_second": assumptions.BANDWIDTH,
    "latencies": {name: dict(vars(x)) for name, x in LEVELS.items()},
  }


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
  """Kernels and sums as a Markdown table; cycles are of one chunk-head."""
  head = (
    "kernel",
    *_COLUMNS,
    "kcycles low/mid/high",
    "ms low/mid/high",
    "floor",
  )
  lines = [head]
  for row in [*rows, *sums_of(rows)]:
    ms = "/".join(f"{row[f'ms_{level}']:.2f}" for level in LEVELS)
    floor = "?" if row["floor_ms"] is None else f"{row['floor_ms']:.3f}"
    if "kernels" in row:
      lines.append((row["name"], *[""] * (len(_COLUMNS) + 1), ms, floor))
      continue
    busy = {"issue": row["issue"], **row["busy_cycles"]}
    cycles = "/".join(f"{x / 1e3:.1f}" for x in row["cycles"].values())
    short = (f"{busy[name] / 1e3:.1f}k" for name in _COLUMNS)
    lines.append((row["name"], *short, cycles, ms, floor))
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  rule = [width * "-" for width in widths]
  rule[1:] = [f"{dashes[:-1]}:" for dashes in rule[1:]]
  lines.insert(1, tuple(rule))
  forms = [f"{'<' if i == 0 else '>'}{w}" for i, w in enumerate(widths)]
  return "\n".join(
    f"| {' | '.join(map(format, line, forms))} |" for line in lines
  )


def slower(
  rows: Sequence[Mapping[str, Any]],
  record: Mapping[str, Any],
  *,
  complete: bool = True,
) -> list[str]:
  """Kernels that are slower than in a record, or not in both; one line each.

  A record of other assumptions is a failure, too.

  Args:
    rows: of kernels, compiled now.
    record: as `record_of` makes it.
    complete: True if a kernel of the record must not be missing.
  """
  now, then = _cycles(rows), _cycles(record["rows"])
  found = []
  if record.get("assumptions") != _assumptions():
    found.append("the record has other assumptions: `make model` renews it")
  if complete:
    missing = (name for name in then if name not in now)
    found += [f"{name}: recorded, but not modelled now" for name in missing]
  for name, cycles in now.items():
    if name not in then:
      found.append(f"{name}: not recorded")
    elif cycles > (1 + MAX_SLOWER) * then[name]:
      found.append(
        f"{name}: {cycles:,.0f} cycles per chunk-head, recorded "
        f"{then[name]:,.0f} ({cycles / then[name] - 1:+.1%}, at most "
        f"{MAX_SLOWER:+.0%})"
      )
  return found


def notes_on(
  rows: Sequence[Mapping[str, Any]],
  versions: Mapping[str, str],
  record: Mapping[str, Any],
) -> list[str]:
  """Other versions of programs than a record's, and kernels that are faster."""
  found = [
    f"{name} {version}, recorded with {record.get(name)}"
    for name, version in versions.items()
    if version != record.get(name)
  ]
  then = _cycles(record["rows"])
  for name, cycles in _cycles(rows).items():
    if name in then and cycles < (1 - MAX_SLOWER) * then[name]:
      change = cycles / then[name] - 1
      found.append(f"{name}: {change:+.1%}; `make model` records it")
  return found


def _cycles(rows):
  """Cycles of kernels at the level "mid", by name."""
  return {row["name"]: row["cycles"]["mid"] for row in rows if "cycles" in row}


def load_record(path: pathlib.Path) -> dict[str, Any]:
  """A record of `record_of`; ValueError if it is none."""
  try:
    record = json.loads(path.read_text())
    if not isinstance(record["rows"], list):
      raise KeyError("rows")
  except (OSError, json.JSONDecodeError, KeyError, TypeError) as e:
    raise ValueError(
      f"{path}: {type(e).__name__}: {e}, expected a record of `make model`"
    ) from e
  return record
