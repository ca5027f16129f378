"""Results of the other evaluations, read from the files that they write."""

import collections
import dataclasses
import json
import pathlib
import re
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from gdn2_jax.eval.recall.tasks import LENGTH
from gdn2_jax.eval.rows import ROWS, SETTINGS


@dataclasses.dataclass(frozen=True)
class Result:
  """One number of one model.

  Attributes:
    model: folder of the run or of the published model.
    step: step of the checkpoint; None for a published model.
    weights: SHA-256 of the parameters; "" where the file has none.
    source: evaluation, task and metric.
    value: a fraction for accuracies.
    variant: settings that make results of one task incomparable, such as the
      generator and the essays of RULER; rows of a table differ in them.
    note: what else the reader must know, such as a limited number of examples.
    file: its origin.
  """

  model: str
  step: int | None
  weights: str
  source: tuple[str, str, str]
  value: float
  variant: str = ""
  note: str = ""
  file: str = ""


def read_results(
  paths: Iterable[str],
) -> tuple[list[Result], list[Result]]:
  """Reads files and folders of results.

  Args:
    paths: JSON files of `eval loss` and `eval ruler`; folders of `eval ruler`,
      `recall` and `harness` (settings.json with rows.jsonl); or folders that
      hold such files and folders directly.

  Returns:
    Results in the order of the paths; and those of tasks that are not complete,
    whose notes say how much is there.

  Raises:
    ValueError: no such path, or a path without results.
    OSError: a file cannot be read.
  """
  results, unfinished = [], []
  for name in paths:
    path = pathlib.Path(name)
    if not path.exists():
      raise ValueError(f"--results={name}: no such file or folder")
    files = [path] if path.is_file() else list(_result_files(path))
    if not files:
      raise ValueError(
        f"--results={name}: expected JSON files of `eval loss`, or folders "
        f"with {SETTINGS} and {ROWS}"
      )
    for file in files:
      if file.suffix == ".jsonl":
        found, missing = _read_rows(file)
        unfinished += missing
      else:
        found = _read_summary(file)
      results += found
  return results, unfinished


def _result_files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  if (folder / ROWS).exists():
    yield folder / ROWS
    return
  for path in sorted(folder.iterdir()):
    if path.is_dir() and (path / ROWS).exists():
      yield path / ROWS
    elif path.suffix == ".json" and path.name != SETTINGS:
      yield path


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    content = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f"--results: {path} is not JSON: {error}") from None
  if not isinstance(content, dict):
    raise ValueError(f"--results: {path}: expected a JSON object")
  return content


def _read_summary(path: pathlib.Path) -> list[Result]:
  """Results of a JSON file, by the fields that tell its evaluation."""
  content = _read_json(path)
  if content.keys() >= {"workdir", "step", "results"}:
    return list(_loss(content, path))
  if content.keys() >= {"generator", "essays", "results"}:
    return list(_ruler_summary(content, path))
  raise ValueError(
    f"--results: {path}: expected what `eval loss --json` or `eval ruler "
    "--json` writes"
  )


def _loss(content: dict[str, Any], path: pathlib.Path) -> Iterator[Result]:
  """Losses of the model by row length, without those of n-gram models."""
  for report in content["results"]:
    if match := re.match(r"model (\d+)x", report["name"]):
      for metric in ("nats_per_token", "bits_per_byte", "perplexity"):
        yield Result(
          model=content["workdir"],
          step=content["step"],
          weights="",
          source=("loss", match[0], metric),
          value=report[metric],
          file=str(path),
        )


def _ruler_summary(content, path) -> Iterator[Result]:
  common = _ruler_common(content, path)
  for cell in content["results"]:
    if found := cell.get("generated"):
      yield dataclasses.replace(
        common,
        source=("ruler", cell["task"], str(cell["length"])),
        value=found["mean"],
        note=_ruler_note(cell["samples"]),
      )


def _read_rows(path: pathlib.Path) -> tuple[list[Result], list[Result]]:
  settings = _read_json(path.parent / SETTINGS)
  kind = settings.get("evaluation")
  if kind not in _READERS:
    raise ValueError(
      f"--results: {path.parent / SETTINGS}: evaluation={kind!r}, expected one "
      f"of {', '.join(_READERS)}"
    )
  rows = []
  for number, line in enumerate(path.read_text().split("\n")[:-1], 1):
    try:
      rows.append(json.loads(line))
    except ValueError:
      raise ValueError(f"--results: {path}: line {number} is damaged") from None
  return _READERS[kind](settings, rows, path)


def _common(settings: dict[str, Any], path: pathlib.Path) -> Result:
  model = settings["model"]
  return Result(
    model=model["name"],
    step=model["step"],
    weights=model["weights"],
    source=("", "", ""),
    value=0.0,
    file=str(path),
  )


def _harness(settings, rows, path):
  """One row per task, with all its metrics: nothing is averaged here."""
  limit = settings["limit"]
  notes = [] if limit is None else [f"harness: first {limit} examples per task"]
  # Other programs score documents in windows, with less context on average.
  carried = [*notes, "WikiText: state carried through documents"]
  return [
    dataclasses.replace(
      _common(settings, path),
      source=("harness", result["task"], result["metric"]),
      value=result["value"],
      note="; ".join(carried if result["task"] == "wikitext" else notes),
    )
    for row in rows
    for result in row["results"]
    if result["value"] is not None and result["filter"] == "none"
  ], []


def _recall(settings, rows, path):
  """One row per example, whose number the settings have."""
  notes = []
  if settings["limit"] is not None:
    notes.append(f"first {settings['limit']} examples per task")
  if settings["length"] != LENGTH:
    notes.append(f"contexts of {settings['length']} tokens")
  note = "; ".join(f"recall: {note}" for note in notes)
  by_task = collections.defaultdict(list)
  for row in rows:
    by_task[row["task"]].append(row["contains"])
  results, unfinished = [], []
  for task, values in by_task.items():
    count = settings["examples"][task]
    found = dataclasses.replace(
      _common(settings, path),
      source=("recall", task, "contains"),
      value=statistics.fmean(values),
      note=note,
    )
    if len(values) == count:
      results.append(found)
      continue
    amount = (
      f"recall {task}: {len(values)} of {count} examples in {path}; left blank "
      "until it is complete"
    )
    unfinished.append(dataclasses.replace(found, note=amount))
  return results, unfinished


def _ruler(settings, rows, path):
  """One row per sample, of which more can be added at any time."""
  by_cell = collections.defaultdict(list)
  for row in rows:
    if "generated" in row:
      by_cell[row["task"], str(row["length"])].append(row["generated"])
  return [
    dataclasses.replace(
      _ruler_common(settings, path),
      source=("ruler", *cell),
      value=statistics.fmean(values),
      note=_ruler_note(len(values)),
    )
    for cell, values in by_cell.items()
  ], []


def _ruler_common(settings: dict[str, Any], path: pathlib.Path) -> Result:
  names = ("generator", "essays", "keys")
  variant = ", ".join(f"{name} {settings[name]}" for name in names)
  return dataclasses.replace(_common(settings, path), variant=variant)


def _ruler_note(samples: int) -> str:
  # The paper has 500 of each task and length.
  return "" if samples == 500 else f"RULER: {samples} samples"


_READERS = {"harness": _harness, "recall": _recall, "ruler": _ruler}
