"""Our results beside the paper's: separate rows under the same columns."""

import collections
import dataclasses
from collections.abc import Sequence

from gdn2_jax.eval.table.paper import (
  Cell,
  Column,
  Row,
  Table,
  components,
  is_uncertain,
  paper_table,
)
from gdn2_jax.eval.table.results import Result

OURS = "Ours"
_UNCERTAIN = (
  "?: transcriptions of the paper differ in this cell, or it looks displaced; "
  "compare with the PDF"
)


def compare(
  layout: str, results: Sequence[Result], unfinished: Sequence[Result] = ()
) -> Table:
  """The paper's table with a group of our rows below it.

  Each of our rows is one model at one step, and one variant of a generator. A
  mean is given where all its parts are there; a missing number stays blank.

  Args:
    layout: "2" to "5".
    results: of any evaluations; those that have no column here are left out.
    unfinished: results of incomplete tasks: their cells stay blank, and their
      notes are below the table.

  Raises:
    ValueError: an unknown layout, or two different results for one cell.
  """
  paper = paper_table(layout)
  parts = {
    column.name: components(layout, column.name) for column in paper.columns
  }
  wanted = {part.source for few in parts.values() for part in few}
  results = [result for result in results if result.source in wanted]
  notes = [result.note for result in unfinished if result.source in wanted]
  ours = []
  for (model, step), found in _by_model(results).items():
    variants = dict.fromkeys(r.variant for r in found if r.variant)
    for variant in variants or ("",):
      chosen = [r for r in found if r.variant in ("", variant)]
      cells = tuple(
        _cell(column, parts[column.name], _by_source(chosen))
        for column in paper.columns
      )
      name = model if step is None else f"{model}, step {step}"
      ours.append(Row(name, cells, _provenance(variant, chosen)))
  groups = (*paper.groups, (OURS, tuple(ours))) if ours else paper.groups
  if is_uncertain(paper):
    notes.append(_UNCERTAIN)
  if not ours:
    notes.append("None of the results has a column in this layout")
  return _without_empty_own_columns(
    dataclasses.replace(paper, groups=groups, notes=tuple(notes))
  )


def _by_model(results) -> dict[tuple[str, int | None], list[Result]]:
  models = collections.defaultdict(list)
  for result in results:
    models[result.model, result.step].append(result)
  for (model, step), found in models.items():
    hashes = {r.weights: r.file for r in found if r.weights}
    if len(hashes) > 1:
      first, second = list(hashes.values())[:2]
      raise ValueError(
        f"--results: {first} and {second} name the same model, {model}, step "
        f"{step}, but were computed with other weights"
      )
  return models


def _by_source(results) -> dict[tuple[str, ...], float]:
  """Values by source; the same number twice is one result."""
  chosen: dict[tuple[str, ...], Result] = {}
  for result in results:
    other = chosen.setdefault(result.source, result)
    if other.value != result.value:
      raise ValueError(
        f"--results: two results for {' '.join(result.source)} of "
        f"{result.model}: {other.value} in {other.file} and {result.value} in "
        f"{result.file}; name one of them"
      )
  return {source: result.value for source, result in chosen.items()}


def _cell(
  column: Column,
  parts: tuple[Column, ...],
  values: dict[tuple[str, ...], float],
) -> Cell:
  if any(part.source not in values for part in parts):
    return Cell()
  numbers = [
    values[part.source] * (100 if part.percent else 1) for part in parts
  ]
  return Cell(sum(numbers) / len(numbers))


def _provenance(variant: str, results: Sequence[Result]) -> str:
  notes = dict.fromkeys(
    n for r in results if r.note for n in r.note.split("; ")
  )
  weights = next((r.weights for r in results if r.weights), "")
  tag = f"weights {weights[:8]}" if weights else ""
  return "; ".join(filter(None, ["gdn2_jax", tag, variant, *notes]))


def _without_empty_own_columns(table: Table) -> Table:
  rows = [row for _, rows in table.groups for row in rows]
  keep = [
    i
    for i, column in enumerate(table.columns)
    if not column.own or any(row.cells[i].value is not None for row in rows)
  ]
  groups = tuple(
    (
      name,
      tuple(
        dataclasses.replace(row, cells=tuple(row.cells[i] for i in keep))
        for row in rows
      ),
    )
    for name, rows in table.groups
  )
  columns = tuple(table.columns[i] for i in keep)
  return dataclasses.replace(table, columns=columns, groups=groups)
