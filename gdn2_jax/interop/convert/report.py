"""Report of a conversion as a table."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from gdn2_jax.interop.convert.opened import Opened

_HEADER = ("", "tensors read", "written", "parameters", "dtype")


@dataclasses.dataclass(frozen=True)
class Report:
  """Tensors read and written by a conversion; `str` is a table.

  Attributes:
    source, target: dialects.
    opened: the model that was read.
    written: tensors that were written, by name.
    names: {name of ours: (name read, name written)}.
    files: names of the files that were written.
    notes: lines worth reading.
  """

  source: str
  target: str
  opened: Opened
  written: Mapping[str, Any]
  names: Mapping[str, tuple[str, str]]
  files: list[str]
  notes: list[str]

  @property
  def parameters(self) -> int:
    """Number of parameters of the model that was written."""
    return _count(self.written)

  def __str__(self) -> str:
    c = self.opened.config
    lines = [
      f"{self.source} -> {self.target}: {c.num_layers} layers of pattern "
      f"{c.pattern!r}, width {c.model_dim}, vocabulary {c.vocab_size}, output "
      f"gate {c.gdn2.output_gate}",
      "",
      *_columns([_HEADER, *self._rows()]),
    ]
    derived = self.parameters - _count(self.opened.read)
    if derived:
      lines += ["", f"{derived:+,} parameters that are copies:"]
      lines += [f"  {line}" for line in self._derived()]
    if self.notes:
      lines += ["", *(f"note: {note}" for note in self.notes)]
    return "\n".join(lines)

  def _rows(self):
    parts = {}
    for ours, (read, written) in self.names.items():
      part = parts.setdefault(_part_of(ours, self.opened), ({}, {}))
      part[0][read] = self.opened.read[read]
      part[1][written] = self.written[written]
    for name in _PARTS:
      if name in parts:
        yield _row(name, *parts[name])
    yield _row("total", self.opened.read, self.written)

  def _derived(self):
    """One line for each kind of copy, with its first instance."""
    kinds: dict[str, list] = {}
    for move in self.opened.moves:
      if move.derived:
        kinds.setdefault(move.derived, []).append(move)
    for reason, (first, *rest) in kinds.items():
      yield (
        f"{reason}: {first.theirs} -> {', '.join(first.ours)}, and "
        f"{len(rest)} like it"
      )


_PARTS = (
  "embedding",
  "GDN-2 mixers",
  "attention mixers",
  "MLPs",
  "norms",
  "head",
)


def _part_of(name: str, opened: Opened) -> str:
  path = name.split(".")
  if path[0] != "layers":
    return {"embedding": "embedding", "head": "head"}.get(path[0], "norms")
  if path[2] == "mixer":
    pattern = opened.config.pattern
    kind = pattern[int(path[1]) % len(pattern)]
    return "GDN-2 mixers" if kind == "G" else "attention mixers"
  return "MLPs" if path[2] == "mlp" else "norms"


def _row(part: str, read: Mapping[str, Any], written: Mapping[str, Any]):
  found, kept = (
    ", ".join(dict.fromkeys(str(t.dtype) for t in tensors.values()))
    for tensors in (read, written)
  )
  dtypes = found if found == kept else f"{found} -> {kept}"
  numbers = (len(read), len(written), _count(written))
  return (part, *(f"{n:,}" for n in numbers), dtypes)


def _count(tensors: Mapping[str, Any]) -> int:
  return sum(math.prod(tensor.shape) for tensor in tensors.values())


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return [
    "  ".join(
      cell.ljust(width) if i in (0, len(row) - 1) else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  ]
