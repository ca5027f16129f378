"""Tables of the GPU benchmark, for the terminal and benchmarks/README.md."""

import re
from collections.abc import Sequence
from typing import Any

from gdn2_jax.bench.gpu.names import COLUMNS, OURS, PARTS
from gdn2_jax.bench.gpu.part import Row

BEGIN = "<!-- gpu: begin (written by make gpu) -->"
END = "<!-- gpu: end -->"


def tables(result: dict[str, Any]) -> str:
  """All rows as Markdown tables."""
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
  by_part = {p: [row for row in rows if row["part"] == p] for p in PARTS}
  if by_part["check"]:
    blocks.append(_check(by_part["check"]))
  if by_part["time"] or by_part["peers"]:
    blocks.append(_time(by_part["time"], by_part["peers"]))
  if by_part["step"]:
    blocks.append(_step(by_part["step"]))
  failed = failures(rows)
  if failed:
    lines = [f"FAILED: {len(failed)} of {len(rows)} rows"]
    lines += [f"* {r['part']}: {r['label']}: {_why(r)}" for r in failed]
    blocks.append("\n".join(lines))
  return "\n\n".join(blocks)


def failures(rows: list[Row]) -> list[Row]:
  """Rows of our kernels that failed; a peer's failure is a note."""
  return [
    row for row in rows if row.get("passed") is False and row["part"] != "peers"
  ]


def update(text: str, block: str) -> str:
  """Text with `block` between the markers; ValueError without them."""
  before, begin, rest = text.partition(BEGIN)
  _, end, after = rest.partition(END)
  if not begin or not end:
    raise ValueError(f"README.md: expected the lines {BEGIN!r} and {END!r}")
  return f"{before}{BEGIN}\n\n{block}\n\n{END}{after}"


def slug(device: str) -> str:
  """Device name as part of a file name."""
  return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_") or "unknown"


def _check(rows: list[Row]) -> str:
  cells = []
  for row in rows:
    if "errors" not in row:
      cells.append((row["label"], *5 * ("",), row["note"]))
      continue
    error = float(row["errors"][row["worst"]])
    unit = row["rounding"][row["worst"]]
    ratio = (f"{unit:.1e}", f"{error / unit:.2f}") if unit else ("-", "-")
    verdict = "ok" if row["passed"] else "FAILED"
    errors = (row["worst"], f"{error:.1e}", *ratio, f"{row['bound']:.1e}")
    cells.append((row["label"], *errors, verdict))
  return _table(
    "Errors: relative RMS of the worst output or gradient, in units of the "
    "error of rounding the exact result.",
    ("case", "worst", "error", "rounding", "ratio", "bound", "verdict"),
    cells,
  )


def _time(rows: list[Row], peers: list[Row]) -> str:
  copies = [r for r in rows if r["label"] == "copy" and "gb_per_s" in r]
  copy = copies[0]["gb_per_s"] if copies else None
  ours = OURS[0]
  found = {r["label"]: r for r in rows if r not in copies}
  times = {label: dict(r.get("ms", {})) for label, r in found.items()}
  notes = {}
  for row in rows:
    for name, note in row.get("notes", {}).items():
      notes.setdefault(f"{name}: {note}", []).append(row["label"])
  for row in peers:  # labelled "<label of the row>, <peer>"
    label, _, peer = row["label"].partition(", ")
    times.setdefault(label, {}).update(row.get("ms", {}))
    if "note" in row:
      notes.setdefault(f"{peer}: {row['note']}", []).append(label)
  cells = []
  for label, ms in times.items():
    row = found.get(label, {})
    note = [row["note"]] if "note" in row else []
    if not ms and note:
      cells.append((label, *note))
      continue
    rate = row.get("gb_per_s", {}).get(ours)
    share = f"{100 * rate / copy:.0f}%" if rate and copy else "-"
    figures = [_milliseconds(ms, name, ours) for name in COLUMNS]
    figures += [f"{rate:.0f}" if rate else "-", share]
    cells.append((label, *figures, *note))
  table = _table(
    f"Times in ms (x: as a multiple of {ours}); B/s: bytes of arguments and "
    f"results over the time of {ours}"
    + (f", in GB/s and of the {copy:.0f} GB/s of a copy." if copy else "."),
    ("what", *COLUMNS, "GB/s", "of copy"),
    cells,
  )
  lines = [f"* {note} ({', '.join(where)})" for note, where in notes.items()]
  return "\n".join([table, "", *lines] if lines else [table])


def _step(rows: list[Row]) -> str:
  cells = []
  for row in rows:
    memory = row.get("memory_bytes")
    memory = f"{memory / 1e9:.1f} GB" if memory else ""
    failed = row.get("passed") is False
    verdict = row.get("note", "FAILED" if failed else "ok")
    rates = "", "", ""
    if "tokens_per_s" in row:
      mfu = f"{100 * row['mfu']:.1f}%" if "mfu" in row else "-"
      rates = f"{row['tokens_per_s']:.0f}", f"{1e3 * row['step_s']:.0f}", mfu
    op = row.get("implementation", "")
    cells.append((row["label"], op, *rates, memory, verdict))
  return _table(
    "Training step of the 1.3B hybrid, tokens x rows; memory as compiled.",
    ("shape", "op", "tokens/s", "ms", "MFU", "memory", "verdict"),
    cells,
  )


def _table(text: str, head: Sequence[str], rows: list[Sequence[str]]) -> str:
  """A sentence and a Markdown table below it."""
  lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
  lines.insert(1, "|" + len(head) * "---|")
  return "\n".join([text, "", *lines])


def _milliseconds(ms, name, ours):
  if name not in ms:
    return "-"
  cell = f"{ms[name]:.3g}"
  if name != ours and ours in ms:
    cell += f" (x{ms[name] / ms[ours]:.2f})"
  return cell


def _why(row):
  if "errors" in row:
    return f"{row['worst']} {row['errors'][row['worst']]}"
  return row.get("note", "loss or gradient not finite")
