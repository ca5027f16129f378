"""Numbers of the paper: averages recomputed, tables that agree, shipped."""

import pathlib
import tomllib

import pytest

import gdn2_jax
from gdn2_jax.eval.table.paper import Cell, components, paper_table

ROWS = {"2": 13, "3": 12, "4": 13, "5": 4}


def rows_of(layout):
  """(group, model) -> column -> cell."""
  table = paper_table(layout)
  return {
    (group, row.model): dict(
      zip((c.name for c in table.columns), row.cells, strict=True)
    )
    for group, rows in table.groups
    for row in rows
  }


@pytest.mark.parametrize("layout", ROWS)
def test_every_row_has_every_column_and_a_provenance(layout):
  table = paper_table(layout)
  rows = [row for _, rows in table.groups for row in rows]
  assert len(rows) == len(rows_of(layout)) == ROWS[layout]
  for row in rows:
    assert row.provenance == (
      f"Gated DeltaNet-2, arXiv 2605.22791, Table {layout}, single seed"
    )
    for column, cell in zip(table.columns, row.cells, strict=True):
      # What the paper does not report is blank; the rest is a number or a "?".
      assert (cell == Cell()) == column.own, (row.model, column.name)


@pytest.mark.parametrize("layout, parts", [("2", 9), ("4", 6)])
def test_averages_are_those_of_their_columns(layout, parts):
  columns = components(layout, "Avg")
  assert len(columns) == parts
  for model, cells in rows_of(layout).items():
    mean = sum(cells[column.name].value for column in columns) / parts
    # Rounded to two digits; halves of floats may round either way.
    assert abs(cells["Avg"].value - mean) < 0.005 + 1e-9, model


def test_the_full_model_of_the_ablation_is_that_of_the_other_tables():
  recurrent = ("Recurrent", "GDN-2")
  full = {name: c.value for name, c in rows_of("5")[recurrent].items()}
  two, three, four = (rows_of(n)[recurrent] for n in "234")
  assert full == {
    "Wiki ppl": two["Wiki ppl"].value,
    "LMB ppl": two["LMB ppl"].value,
    "commonsense avg": two["Avg"].value,
    "S-NIAH-2 4K": three["S-NIAH-2 4K"].value,
    "S-NIAH-3 2K": three["S-NIAH-3 2K"].value,
    "MK-NIAH-1 4K": three["MK-NIAH-1 4K"].value,
    "recall avg": four["Avg"].value,
  }


def test_uncertain_cells_are_marked_and_only_in_table_3():
  marked = {
    layout: sum(
      cell.uncertain
      for cells in rows_of(layout).values()
      for cell in cells.values()
    )
    for layout in ROWS
  }
  assert marked == {"2": 0, "3": 19, "4": 0, "5": 0}
  assert Cell(29.0, uncertain=True).text(1) == "29.0?"
  assert Cell(None, uncertain=True).text(1) == "?"
  assert Cell().text(1) == "" and Cell(0.0).text(1) == "0.0"
  assert Cell(12345678.9).text(2) == "1.23e+07"


def test_columns_of_the_ablation_are_made_of_single_results():
  assert len(components("5", "commonsense avg")) == 9
  (column,) = components("5", "S-NIAH-2 4K")
  assert column.source == ("ruler", "niah_single_2", "4096") and column.percent


def test_the_numbers_are_in_the_wheel():
  root = pathlib.Path(gdn2_jax.__file__).parent
  settings = tomllib.loads((root.parent / "pyproject.toml").read_text())
  data = settings["tool"]["setuptools"]["package-data"]["gdn2_jax"]
  found = {path for pattern in data for path in root.glob(pattern)}
  assert root / "eval" / "table" / "paper.json" in found


def test_other_layouts_are_refused():
  with pytest.raises(ValueError, match="layout='1': expected one of 2, 3, 4"):
    paper_table("1")
