"""Writer of metrics.jsonl.

One JSON object per line, {"step": ..., "kind": ...} with kind "train", "eval"
or "final"; numbers that are not finite are written as null. Each line is
flushed. On a resume the lines beyond the restored step are dropped, and so is
the final one, so that the file never holds a row twice.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from gdn2_jax.files import write_atomically


def read_rows(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Rows of a metrics.jsonl, without a last line that a kill cut off."""
  rows = []
  for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines():
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return rows


class JsonlWriter:
  """Appends rows to metrics.jsonl.

  Attributes:
    found: rows that were in the file.
    kept: those of them that a run from `first_step` on keeps.
  """

  def __init__(self, workdir: str | os.PathLike, first_step: int = 0):
    path = pathlib.Path(workdir) / "metrics.jsonl"
    self.found = read_rows(path) if path.exists() else []
    self.kept = [
      row
      for row in self.found
      if row["step"] <= first_step and row["kind"] != "final"
    ]
    if path.exists():
      text = "".join(json.dumps(row) + "\n" for row in self.kept)
      write_atomically(path, text.encode())
    self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

  def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
    """Appends a row."""
    row: dict[str, Any] = {"step": step, "kind": kind}
    for name, value in values.items():
      finite = not isinstance(value, float) or math.isfinite(value)
      row[name] = value if finite else None
    self._file.write(json.dumps(row) + "\n")
    self._file.flush()

  def text(self, name: str, text: str) -> None:
    """Writes nothing: config.json is a file of its own."""

  def close(self) -> None:
    """Closes the file."""
    self._file.close()
