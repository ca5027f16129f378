"""Tables 2 to 5 of the paper (arXiv 2605.22791), from paper.json."""

import dataclasses
import importlib.resources
import json
from typing import Any

LAYOUTS = ("2", "3", "4", "5")


@dataclasses.dataclass(frozen=True)
class Column:
  """One column of a table.

  Attributes:
    name: heading.
    source: evaluation, task and metric of the result that fills it.
    mean_of: names of the columns that it is the mean of, or ().
    percent: results are fractions, shown times 100.
    digits: digits after the point.
    own: not in the paper; shown only where we have a result.
  """

  name: str
  source: tuple[str, ...] = ()
  mean_of: tuple[str, ...] = ()
  percent: bool = False
  digits: int = 2
  own: bool = False


@dataclasses.dataclass(frozen=True)
class Cell:
  """A number, or its absence.

  Attributes:
    value: None where there is no number.
    uncertain: transcriptions of the paper differ in this cell.
  """

  value: float | None = None
  uncertain: bool = False

  def text(self, digits: int) -> str:
    """The number, "?" where it is uncertain, "" where there is none."""
    number = "" if self.value is None else f"{self.value:.{digits}f}"
    if len(number) > 9:  # perplexities of untrained models
      number = f"{self.value:.2e}"
    return number + "?" * self.uncertain


@dataclasses.dataclass(frozen=True)
class Row:
  """One model.

  Attributes:
    model: name.
    cells: as many as the table has columns.
    provenance: source of the numbers.
  """

  model: str
  cells: tuple[Cell, ...]
  provenance: str


@dataclasses.dataclass(frozen=True)
class Table:
  """Groups of rows under common columns.

  Attributes:
    title: number and subject of the paper's table.
    columns: headings and sources.
    groups: name and rows of each part.
    notes: lines below the table.
  """

  title: str
  columns: tuple[Column, ...]
  groups: tuple[tuple[str, tuple[Row, ...]], ...]
  notes: tuple[str, ...] = ()


def paper_table(layout: str) -> Table:
  """One of the paper's tables.

  Args:
    layout: "2", "3", "4" or "5".

  Raises:
    ValueError: another layout.
  """
  if layout not in LAYOUTS:
    raise ValueError(
      f"layout={layout!r}: expected one of {', '.join(LAYOUTS)}, the tables of "
      "the paper"
    )
  paper = _load()
  table = paper["tables"][layout]
  columns = tuple(_column(paper, c) for c in table["columns"])
  missing = sum(column.own for column in columns)  # always the last ones
  provenance = f"{paper['work']}, Table {layout}, {paper['seeds']}"
  groups = {}
  for row in table["rows"]:
    cells = tuple(_cell(x) for x in row["cells"]) + (Cell(),) * missing
    rows = groups.setdefault(paper["groups"][row["group"]], [])
    rows.append(Row(row["model"], cells, provenance))
  return Table(
    title=f"Layout of Table {layout}: {table['caption']}",
    columns=columns,
    groups=tuple((name, tuple(rows)) for name, rows in groups.items()),
  )


def is_uncertain(table: Table) -> bool:
  """True if a number of the table is marked with "?"."""
  rows = [row for _, rows in table.groups for row in rows]
  return any(cell.uncertain for row in rows for cell in row.cells)


def components(layout: str, name: str) -> tuple[Column, ...]:
  """Columns of single results that decide a column: itself, or its parts."""
  paper = _load()
  table, name = _home(paper, layout, name)
  columns = {
    c["name"]: _column(paper, c) for c in paper["tables"][table]["columns"]
  }
  column = columns[name]
  return tuple(columns[part] for part in column.mean_of) or (column,)


def _load() -> dict[str, Any]:
  file = importlib.resources.files(__package__) / "paper.json"
  return json.loads(file.read_text())


def _home(paper, layout, name) -> tuple[str, str]:
  """Table and name of the column that defines a column."""
  for column in paper["tables"][layout]["columns"]:
    if column["name"] == name:
      return tuple(column.get("same_as", (layout, name)))
  raise KeyError(name)


def _column(paper, fields: dict[str, Any]) -> Column:
  if "same_as" in fields:
    table, name = fields["same_as"]
    (found,) = (
      c for c in paper["tables"][table]["columns"] if c["name"] == name
    )
    fields = found | {"name": fields["name"]}
  lists = {
    key: tuple(fields[key]) for key in ("source", "mean_of") if key in fields
  }
  return Column(**fields | lists)


def _cell(x: float | str | None) -> Cell:
  if isinstance(x, str):
    number = x.removesuffix("?")
    return Cell(float(number) if number else None, uncertain=True)
  return Cell(x)
