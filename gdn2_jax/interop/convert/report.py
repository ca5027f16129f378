"""Report of a conversion as a table."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from gdn2_jax.interop.convert.opened import Opened
from gdn2_jax.interop.names import Move
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.mixers.registry import kind_of

_HEADER = ("", "tensors read", "written", "parameters", "dtype")


@dataclasses.dataclass(frozen=True)
class Report:
  """Tensors read and written by a conversion; `str` is a table.

  Attributes:
    source, target: dialects.
    opened: the model that was read.
    written: tensors that were written, by name.
    moves: from our parameters to the names written, [] where they are ours.
    files: names of the files that were written.
    notes: lines for the user.
  """

  source: str
  target: str
  opened: Opened
  written: Mapping[str, Any]
  moves: list[Move]
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

  def _rows(self) -> Iterator[tuple[str, ...]]:
    """Rows of the table: one for each part of the model, and the total."""
    sides = (
      (self.opened.read, self.opened.moves),
      (self.written, self.moves),
    )
    parts = {}
    for side, (tensors, moves) in enumerate(sides):
      names = {name: move.theirs for move in moves for name in move.ours}
      for ours in self.opened.tensors:
        part = _part_of(ours, self.opened.config)
        name = names.get(ours, ours)
        parts.setdefault(part, ({}, {}))[side][name] = tensors[name]
    parts["total"] = self.opened.read, self.written
    for part, (read, written) in parts.items():
      found, kept = (
        ", ".join(dict.fromkeys(str(t.dtype) for t in tensors.values()))
        for tensors in (read, written)
      )
      dtypes = found if found == kept else f"{found} -> {kept}"
      numbers = (len(read), len(written), _count(written))
      yield (part, *(f"{n:,}" for n in numbers), dtypes)

  def _derived(self) -> Iterator[str]:
    """One line for each kind of copy, with its first instance."""
    kinds: dict[str, list] = {}
    for move in self.opened.moves:
      if move.layout.derived:
        kinds.setdefault(move.layout.derived, []).append(move)
    for reason, (first, *rest) in kinds.items():
      yield (
        f"{reason}: {first.theirs} -> {', '.join(first.ours)}, and "
        f"{len(rest)} like it"
      )


def _part_of(name: str, config: ModelConfig) -> str:
  path = name.split(".")
  if path[0] != "layers":
    return path[0] if path[0] in ("embedding", "head") else "norms"
  if path[2] == "mixer":
    kind = config.pattern[int(path[1]) % len(config.pattern)]
    return f"{kind_of(kind).name} mixers"
  return "MLPs" if path[2] == "mlp" else "norms"


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
