"""Environment, tables and JSON files of benchmark results."""

import datetime
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jaxlib

from gdn2_jax.bench import timing
from gdn2_jax.ops.gdn2.api import select_implementation


def date() -> str:
  """Date and time in UTC, to the second."""
  return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def environment() -> dict[str, Any]:
  """Date, device, clock and versions, as every result file has them."""
  return {
    "date": date(),
    "device": jax.devices()[0].device_kind,
    "cpu": _cpu_name(),
    "clock": "one core, CPU time" if timing.is_one_core() else "wall time",
    "jax": jax.__version__,
    "jaxlib": jaxlib.__version__,
    "default_implementation": select_implementation(),
  }


def _cpu_name():
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    return "unknown"
  names = [line for line in lines if line.startswith("model name")]
  return names[0].partition(":")[2].strip() if names else "unknown"


def write_json(path: pathlib.Path, result: dict[str, Any]) -> None:
  """Writes indented JSON and makes the file's folder."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(result, indent=2) + "\n")


class Column(NamedTuple):
  """One column of a text table."""

  head: str
  key: str  # in the rows
  form: str = ""  # of the numbers; "" for names, aligned to the left
  scale: float = 1.0  # factor on the numbers

  def cell(self, row: dict[str, Any]) -> str:
    """Text of a row's value, "-" if it has none."""
    value = row.get(self.key)
    if value is None or not self.form:
      return "-" if value is None else str(value)
    return format(self.scale * value, self.form)


def text_table(
  rows: list[dict[str, Any]], columns: Sequence[Column]
) -> list[str]:
  """Aligned lines; a row's note stands in place of its numbers."""
  shown = [c for c in columns if any(c.key in row for row in rows)]
  cells = [[c.cell(row) for c in shown] for row in rows]
  cells.insert(0, [c.head for c in shown])
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  lines = []
  for row, texts in zip([{}, *rows], cells, strict=True):
    padded = [
      text.rjust(width) if column.form else text.ljust(width)
      for text, width, column in zip(texts, widths, shown, strict=True)
      if "note" not in row or not column.form
    ]
    lines.append(" ".join([*padded, row.get("note", "")]).rstrip())
  return lines
