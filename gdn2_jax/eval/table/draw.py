"""Tables as Markdown and as figures."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from gdn2_jax.analysis import style
from gdn2_jax.eval.table.compare import OURS
from gdn2_jax.eval.table.paper import Table

DPI = 150
_LINE = 0.24  # inches per row
_CHARACTER = 0.075  # inches, at the font size below
_FONT = 8.5


def markdown(table: Table) -> str:
  """A Markdown table, a row for the name of each group, and the notes."""
  names = ["model", *(c.name for c in table.columns), "provenance"]
  lines = [
    f"**{table.title}**",
    "",
    _line(names),
    _line([":---", *["---:"] * len(table.columns), ":---"]),
  ]
  for group, rows in table.groups:
    lines.append(_line([f"*{group}*", *[""] * (len(names) - 1)]))
    for row in rows:
      lines.append(_line([row.model, *_texts(table, row), row.provenance]))
  lines += [line for note in table.notes for line in ("", note)]
  return "\n".join(lines) + "\n"


def figure(table: Table) -> Figure:
  """The same table as a figure; our rows are blue."""
  head = ["", *(c.name for c in table.columns), "provenance"]
  lines: list[tuple[str, Sequence[str]]] = [("head", head)]
  for group, rows in table.groups:
    lines.append(("group", [group]))
    kind = "ours" if group == OURS else "paper"
    for row in rows:
      lines.append((kind, [row.model, *_texts(table, row), row.provenance]))
  full = [
    # Bold letters are wider.
    [len(cell) * (1.2 if kind == "head" else 1.0) for cell in cells]
    for kind, cells in lines
    if len(cells) == len(head)
  ]
  widths = [2 + max(column) for column in zip(*full, strict=True)]
  width = sum(widths) * _CHARACTER + 0.3
  count = len(lines) + len(table.notes)
  height = count * _LINE + 0.8
  result = Figure(figsize=(width, height), dpi=DPI)
  result.suptitle(
    table.title,
    x=0.01,
    y=1 - 0.15 / height,
    ha="left",
    va="top",
    color=style.INK,
    fontsize=12,
  )
  axes = result.add_axes((0.15 / width, 0, 1 - 0.3 / width, 1 - 0.6 / height))
  axes.set_axis_off()
  axes.set_xlim(0, sum(widths))
  axes.set_ylim(-count, 0)
  color = {"ours": style.BLUE, "group": style.MUTED}
  for y, (kind, cells) in enumerate(lines):
    x = 0
    for i, (cell, size) in enumerate(zip(cells, widths, strict=False)):
      number = 0 < i < len(head) - 1
      axes.text(
        x + size - 1 if number else x + (1 if i else 0),
        -y - 0.5,
        cell,
        ha="right" if number else "left",
        va="center",
        color=color.get(kind, style.INK),
        fontsize=_FONT,
        fontweight="bold" if kind == "head" else "normal",
        fontstyle="italic" if kind == "group" else "normal",
      )
      x += size
    if kind in ("head", "group"):
      axes.axhline(-y - (kind == "head"), color=style.GRID, linewidth=0.8)
  for y, note in enumerate(table.notes, len(lines)):
    axes.text(0, -y - 0.5, note, va="center", color=style.MUTED, fontsize=_FONT)
  return result


def _texts(table: Table, row) -> list[str]:
  return [
    cell.text(column.digits)
    for column, cell in zip(table.columns, row.cells, strict=True)
  ]


def _line(cells: Sequence[str]) -> str:
  return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
