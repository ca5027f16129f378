"""Results of the other evaluations, read from the files that they write."""

import collections
import dataclasses
import json
import pathlib
import re
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from gdn2_jax.eval.recall.run import LENGTH
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
    paths: JSON files of `eval loss`, folders of `eval ruler`, `recall` and
      `harness` (settings.json with rows.jsonl), or folders that hold such files
      and folders directly.

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
        found = list(_read_loss(file))
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


def _read_loss(path: pathlib.Path) -> Iterator[Result]:
  """Losses of the model by row length, without those of n-gram models."""
  content = _read_json(path)
  if not content.keys() >= {"workdir", "step", "results"}:
    raise ValueError(
      f"--results: {path}: expected the fields workdir, step and results that "
      "`eval loss --json` writes"
    )
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
  model = settings["model"]
  common = Result(
    model=model["name"],
    step=model["step"],
    weights=model["weights"],
    source=(kind, "", ""),
    value=0.0,
    file=str(path),
  )
  return _READERS[kind](common, settings, rows)


def _harness(common: Result, settings, rows):
  """One row per task and metric: nothing is averaged here."""
  limit = settings["limit"]
  note = "" if limit is None else f"harness: first {limit} examples per task"
  return [
    dataclasses.replace(
      common,
      source=("harness", row["task"], row["metric"]),
      value=row["value"],
      note=note,
    )
    for row in rows
    if row["value"] is not None and row["filter"] == "none"
  ], []


def _recall(common: Result, settings, rows):
  """One row per example."""
  notes = []
  if settings["limit"] is not None:
    notes.append(f"first {settings['limit']} examples per task")
  if settings["length"] != LENGTH:
    notes.append(f"contexts of {settings['length']} tokens")
  return _means(
    common,
    {(task, "contains"): n for task, n in settings["examples"].items()},
    ((row["task"], "contains", row["contains"]) for row in rows),
    note="; ".join(f"recall: {note}" for note in notes),
  )


def _ruler(common: Result, settings, rows):
  """One row per sample; the length in tokens stands in for the metric."""
  return _means(
    dataclasses.replace(
      common,
      variant=f"generator {settings['generator']}, essays {settings['essays']}",
    ),
    {
      (task, str(length)): settings["samples"]
      for task in settings["tasks"]
      for length in settings["lengths"]
    },
    ((row["task"], str(row["length"]), row["contains"]) for row in rows),
    note=f"RULER: {settings['samples']} samples",
  )


_READERS = {"harness": _harness, "recall": _recall, "ruler": _ruler}


def _means(
  common: Result,
  expected: dict[tuple[str, str], int],
  scores: Iterable[tuple[str, str, float | bool]],
  note: str,
) -> tuple[list[Result], list[Result]]:
  """Means by task and metric, of complete ones and of others."""
  by_source = collections.defaultdict(list)
  for task, metric, value in scores:
    by_source[task, metric].append(value)
  results, unfinished = [], []
  for (task, metric), values in by_source.items():
    source = (common.source[0], task, metric)
    count = expected[task, metric]
    found = dataclasses.replace(
      common, source=source, value=statistics.fmean(values), note=note
    )
    if len(values) == count:
      results.append(found)
      continue
    amount = (
      f"{' '.join(source)}: {len(values)} of {count} examples in "
      f"{common.file}; left blank until it is complete"
    )
    unfinished.append(dataclasses.replace(found, note=amount))
  return results, unfinished
