"""The results of the GPU benchmark as tables: terminal and benchmarks/."""

import re
from typing import Any

from gdn2_jax.bench.gpu.names import COLUMNS

BEGIN = "<!-- gpu: begin (written by make gpu) -->"
END = "<!-- gpu: end -->"

Row = dict[str, Any]


def tables(result: dict[str, Any]) -> str:
  """All rows, in Markdown that also reads well in a terminal."""
  rows = result["rows"]
  blocks = []
  if result["rehearsal"]:
    blocks.append(
      "REHEARSAL on a CPU with tiny shapes: the times mean nothing."
    )
  machine = result.get("environment", {})
  blocks.append(
    f"{machine.get('device', 'no device')}, driver {result['driver']}, "
    f"jax {machine.get('jax', '?')}, "
    + ", ".join(f"{n} {v}" for n, v in sorted(result["packages"].items()))
    + f"; {result['date']}"
  )
  for part, table in (("check", _check), ("time", _time), ("step", _step)):
    chosen = [row for row in rows if row["part"] == part]
    if chosen:
      blocks.append(table(chosen))
  failed = [row for row in rows if row.get("passed") is False]
  if failed:
    lines = [f"FAILED: {len(failed)} of {len(rows)} rows"]
    lines += [f"* {r['part']}: {r['label']}: {_why(r)}" for r in failed]
    blocks.append("\n".join(lines))
  return "\n\n".join(blocks)


def update(text: str, block: str) -> str:
  """`text` with what stands between the markers replaced by `block`.

  Raises:
    ValueError: the markers are not there, or not in order.
  """
  before, begin, rest = text.partition(BEGIN)
  _, end, after = rest.partition(END)
  if not begin or not end:
    raise ValueError(f"expected the lines {BEGIN!r} and {END!r}")
  return f"{before}{BEGIN}\n\n{block}\n\n{END}{after}"


def slug(device: str) -> str:
  """A device's name as part of a file's name."""
  return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_") or "unknown"


def _check(rows: list[Row]) -> str:
  lines = [
    "Errors: relative RMS of the worst output or gradient, in units of the "
    "error of rounding the exact result.",
    "",
    _line("case", "worst", "error", "rounding", "ratio", "bound", "verdict"),
    _rule(7),
  ]
  for row in rows:
    if "errors" not in row:
      lines.append(_line(row["label"], *5 * ("",), row["note"]))
      continue
    error, unit = float(row["errors"][row["worst"]]), _unit(row)
    lines.append(
      _line(
        row["label"],
        row["worst"],
        f"{error:.1e}",
        f"{unit:.1e}" if unit else "-",
        f"{error / unit:.2f}" if unit else "-",
        f"{row['bound']:.1e}",
        "ok" if row["passed"] else "FAILED",
      )
    )
  return "\n".join(lines)


def _time(rows: list[Row]) -> str:
  copies = [r for r in rows if r["label"] == "copy" and "gb_per_s" in r]
  copy = copies[0]["gb_per_s"] if copies else None
  ours = COLUMNS[0]
  lines = [
    f"Times in ms (x: as a multiple of {ours}); B/s: bytes of arguments and "
    f"results over the time of {ours}"
    + (f", in GB/s and of the {copy:.0f} GB/s of a copy." if copy else "."),
    "",
    _line("what", *COLUMNS, "GB/s", "of copy"),
    _rule(3 + len(COLUMNS)),
  ]
  notes = {}
  for row in rows:
    if "ms" not in row:
      if row["label"] != "copy" or "note" in row:
        lines.append(_line(row["label"], row["note"]))
      continue
    ms, rate = row["ms"], row["gb_per_s"].get(ours)
    cells = [_milliseconds(ms, name, ours) for name in COLUMNS]
    share = f"{100 * rate / copy:.0f}%" if rate and copy else "-"
    rate = f"{rate:.0f}" if rate else "-"
    lines.append(_line(row["label"], *cells, rate, share))
    for name, note in row["notes"].items():
      notes.setdefault(f"{name}: {note}", []).append(row["label"])
  lines += [""] if notes else []
  lines += [f"* {note} ({', '.join(where)})" for note, where in notes.items()]
  return "\n".join(lines)


def _step(rows: list[Row]) -> str:
  lines = [
    "Training step of the 1.3B hybrid, tokens x rows; memory as compiled.",
    "",
    _line("shape", "op", "tokens/s", "ms", "MFU", "memory", "verdict"),
    _rule(7),
  ]
  for row in rows:
    memory = row.get("memory_bytes")
    memory = f"{memory / 1e9:.1f} GB" if memory else ""
    op, verdict = row.get("implementation", ""), row.get("note", "ok")
    if row.get("passed") is False and "note" not in row:
      verdict = "FAILED"
    if "tokens_per_s" not in row:
      lines.append(_line(row["label"], op, "", "", "", memory, verdict))
      continue
    mfu = f"{100 * row['mfu']:.1f}%" if "mfu" in row else "-"
    rates = (f"{row['tokens_per_s']:.0f}", f"{1e3 * row['step_s']:.0f}")
    lines.append(_line(row["label"], op, *rates, mfu, memory, verdict))
  return "\n".join(lines)


def _milliseconds(ms, name, ours):
  if name not in ms:
    return "-"
  cell = f"{ms[name]:.3g}"
  if name != ours and ours in ms:
    cell += f" (x{ms[name] / ms[ours]:.2f})"
  return cell


def _unit(row):
  return row["rounding"][row["worst"]]


def _why(row):
  if "errors" in row:
    return f"{row['worst']} {row['errors'][row['worst']]}"
  return row.get("note", "loss or gradient not finite")


def _line(*cells: str) -> str:
  return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _rule(columns: int) -> str:
  return "|" + columns * "---|"
