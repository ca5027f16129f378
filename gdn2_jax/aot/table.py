"""Reports of kernels as a Markdown table and as JSON values."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from gdn2_jax.aot.kernels import KernelReport

_HEAD = (
  "case",
  "kernel",
  "jax",
  "registers",
  "spills",
  "threads",
  "shared KB",
  "CTAs/SM",
  "B/token-head",
  "seconds",
)


def kernel_figures(report: KernelReport) -> dict[str, Any]:
  """A report as one flat dict of JSON values."""
  figures = {
    "case": report.case,
    "kernel": report.kernel,
    "ctas_per_sm": report.usage.ctas_per_sm,
    "bytes_per_token_head": report.bytes_per_token_head,
    "compile_seconds": round(report.compile_seconds, 2),
  }
  return {**figures, **dataclasses.asdict(report.usage)}


def kernel_table(reports: Sequence[KernelReport], version: str) -> str:
  """One row per kernel, as a Markdown table; KB are 1024 bytes."""
  rows = [_HEAD]
  for report in reports:
    usage = report.usage
    rows.append(
      (
        report.case,
        report.kernel,
        version,
        str(usage.registers),
        str(usage.spill_stores + usage.spill_loads),
        str(usage.threads),
        f"{usage.shared_bytes / 1024:.1f}",
        str(usage.ctas_per_sm),
        f"{report.bytes_per_token_head:,.0f}",
        f"{report.compile_seconds:.1f}",
      )
    )
  widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
  rows.insert(1, tuple("-" * width for width in widths))
  return "\n".join(_row(row, widths) for row in rows)


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
  # Names to the left, figures to the right.
  padded = [
    cell.ljust(width) if i < 3 else cell.rjust(width)
    for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
  ]
  return f"| {' | '.join(padded)} |"
