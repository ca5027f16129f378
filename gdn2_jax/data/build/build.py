"""Any amount of text into a folder of packed rows, resumable at any moment.

  plan     hash the inputs, cut them into units, fix every number of the build
  units    tokenise each unit, in parallel                       (passes.py)
  shards   collect, order and write each shard, in parallel
  publish  manifest, then one rename

Everything happens in OUT.partial and is a function of the plan alone: a build
that was killed goes on where it was when the same command runs again, and ends
with the same bytes as one that was not. It needs free disk of twice its tokens.
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from gdn2_jax.data import files
from gdn2_jax.data.build import passes
from gdn2_jax.data.build import recipe as plan
from gdn2_jax.data.build.workers import Workers
from gdn2_jax.data.packed import folder as packed
from gdn2_jax.data.tokenizer.api import Tokenizer

Bar = Callable[[str, str, int], Any]


@dataclasses.dataclass(frozen=True)
class Rates:
  """What one run of a build did, and how long its passes took.

  Attributes:
    documents: tokenised, in this run.
    tokens: of them.
    bytes: of their text.
    cpu_seconds: of the first pass, of all workers together.
    tokenize_seconds: of the first pass.
    shuffle_seconds: of the second pass.
    all_bytes: of the text of the whole build, this run's and earlier ones'.
  """

  documents: int
  tokens: int
  bytes: int
  cpu_seconds: float
  tokenize_seconds: float
  shuffle_seconds: float
  all_bytes: int


@dataclasses.dataclass(frozen=True)
class Built:
  """The result of `build_rows`; `rates` is None if nothing was left to do."""

  packed: packed.Packed
  rates: Rates | None


class _NoBar:
  def update(self, count: int) -> None:
    pass

  def close(self) -> None:
    pass


def build_rows(
  paths: Mapping[str, pathlib.Path],
  out: str | os.PathLike[str],
  options: plan.Options,
  *,
  source: Mapping[str, Any],
  checksums: Mapping[str, str] | None = None,
  workers: int = 0,
  bar: Bar = lambda label, unit, total: _NoBar(),
  say: Callable[[str], None] = lambda line: None,
) -> Built:
  """Packs files into a folder that appears whole or not at all.

  Args:
    paths: name -> file; the names go into the manifest and their order
      decides the result, not where the files lie.
    out: the folder to make; may exist if it holds the same data.
    options: what decides the result besides the files.
    source: where the files come from, for the manifest.
    checksums: name -> SHA-256 that the file must have.
    workers: processes; 0 works in the caller's, which decides nothing.
    bar: makes a progress bar of (label, unit, total).
    say: is told about what is resumed or left out.

  Raises:
    ValueError: for unreadable input, by file and place; for a folder that
      holds something else, or that another build is working on.
    RuntimeError: if a worker process died.
  """
  out = pathlib.Path(out)
  taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
  if taken and not (out / "manifest.json").is_file():
    raise ValueError(f"{out}: exists and is not a packed folder")
  partial = out.with_name(out.name + ".partial")
  made = not partial.exists()
  with _locked(partial):
    for path in partial.rglob(".*.tmp.*"):  # of a build that was killed
      path.unlink(missing_ok=True)
    try:
      planned = plan.make_plan(
        paths,
        partial,
        options,
        source=source,
        checksums=checksums or {},
        workers=workers,
        bar=bar,
      )
      for entry in planned.content["skipped"]:
        say(f"left out {entry['path']}: {entry['reason']}")
      if (out / "manifest.json").is_file():
        return _reuse(out, partial, planned)
    except ValueError:
      if made:
        shutil.rmtree(partial)
      raise
    _adopt_plan(partial, planned)
    units, records, rates = _run(partial, planned, workers, bar, say)
    _publish(partial, out, planned, units, records)
  return Built(packed.open_packed(out, verify_hashes=False), rates)


def _run(
  partial: pathlib.Path,
  planned: plan.Plan,
  workers: int,
  bar: Bar,
  say: Callable[[str], None],
) -> tuple[dict[str, Any], list[dict[str, Any]], Rates]:
  recipe, tokenizer = planned.recipe, planned.tokenizer
  for name in ("units", "records"):
    (partial / name).mkdir(exist_ok=True)
  with Workers(workers, recipe, tokenizer) as pool:
    started = time.perf_counter()
    summary = _read_json(partial / "units.json")
    done = {"documents": 0, "tokens": 0, "bytes": 0, "cpu_seconds": 0.0}
    if summary is None or not _has_units(planned):
      summary = _spill_all(partial, planned, pool, done, bar, say)
    spilled = time.perf_counter()
    records = _merge_all(planned, summary, pool, bar)
    merged = time.perf_counter()
  whole = sum(summary["counts"][split]["bytes"] for split in packed.SPLITS)
  rates = Rates(
    **done,
    tokenize_seconds=spilled - started,
    shuffle_seconds=merged - spilled,
    all_bytes=whole,
  )
  return summary, records, rates


def _has_units(planned: plan.Plan) -> bool:
  """Whether no unit was removed, as the error about a damaged one asks for."""
  return all(
    planned.recipe.unit_path(unit.index, "json").is_file()
    for unit in planned.units
  )


def _spill_all(
  partial: pathlib.Path,
  planned: plan.Plan,
  pool: Workers,
  done: dict[str, Any],
  bar: Bar,
  say: Callable[[str], None],
) -> dict[str, Any]:
  """The first pass over all units; `done` counts those of this run."""
  recipe = planned.recipe
  records = {
    unit.index: _read_json(recipe.unit_path(unit.index, "json"))
    for unit in planned.units
  }
  left = [unit for unit in planned.units if records[unit.index] is None]
  if len(left) < len(planned.units):
    finished = len(planned.units) - len(left)
    say(f"resuming: {finished} of {len(planned.units)} units are done")
  progress = bar("tokenize", "B", sum(unit.size for unit in left))
  with contextlib.closing(progress):
    for unit, record in pool.run(passes.spill_unit, left):
      records[unit.index] = record
      done["cpu_seconds"] += record["cpu_seconds"]
      for counts in record["counts"].values():
        for name in ("documents", "tokens", "bytes"):
          done[name] += counts[name]
      progress.update(unit.size)
  counts = {
    split: {
      name: sum(r["counts"][split][name] for r in records.values())
      for name in passes.COUNTS
    }
    for split in packed.SPLITS
  }
  if counts["train"]["documents"] == 0:
    raise ValueError(
      f"no training text in {len(planned.content['inputs'])} files"
    )
  ordered = [records[unit.index] for unit in planned.units]
  bad = [entry for record in ordered for entry in record["bad"]]
  for entry in bad:
    say(f"left out {entry['path']}: {entry['where']}: {entry['reason']}")
  summary = {"counts": counts, "bad": bad}
  files.write_atomic(partial / "units.json", json.dumps(summary).encode())
  return summary


def _merge_all(
  planned: plan.Plan, summary: dict[str, Any], pool: Workers, bar: Bar
) -> list[dict[str, Any]]:
  """The second pass; the records of all shards, train first, in order."""
  recipe = planned.recipe
  names = [
    (split, index)
    for split in packed.SPLITS
    for index in range(recipe.buckets[split])
  ]
  records = {name: _read_json(recipe.shard_record(*name)) for name in names}
  units = len(planned.units)
  tasks = [(*name, units) for name in names if records[name] is None]
  total = sum(counts["tokens"] for counts in summary["counts"].values())
  total -= sum(record["tokens"] for record in records.values() if record)
  progress = bar("shuffle", "tok", total)
  with contextlib.closing(progress):
    for (split, index, _), record in pool.run(_merge, tasks):
      records[split, index] = record
      progress.update(record["tokens"])
  return [records[name] | {"split": name[0]} for name in names]


def _merge(
  task: tuple[str, int, int], recipe: passes.Recipe, tokenizer: Tokenizer
) -> dict[str, Any]:
  dtype = packed.token_dtype(tokenizer.vocab_size).newbyteorder("<")
  return passes.merge_bucket(*task, recipe, dtype)


def _publish(
  partial: pathlib.Path,
  out: pathlib.Path,
  planned: plan.Plan,
  summary: dict[str, Any],
  records: list[dict[str, Any]],
) -> None:
  splits = {}
  for split in packed.SPLITS:
    own = [record for record in records if record["split"] == split]
    counts = summary["counts"][split]
    assert sum(record["tokens"] for record in own) == counts["tokens"]
    assert sum(record["documents"] for record in own) == counts["documents"]
    every = functools.reduce(lambda a, b: a | b, (r["files"] for r in own), {})
    splits[split] = counts | {"shards": len(own), "files": every}
  manifest = planned.content | {
    "plan_sha256": planned.sha256,
    "bad_parts": _by_name(summary["bad"], planned),
    "splits": splits,
  }
  planned.tokenizer.save(partial / "tokenizer.json")
  text = json.dumps(manifest, indent=2) + "\n"
  files.write_atomic(partial / "manifest.json", text.encode())
  # Renamed first and tidied after: a kill in between loses no work.
  if not files.publish(partial, out):
    raise ValueError(f"{out}: appeared while it was being built")
  _tidy(out)


def _tidy(folder: pathlib.Path) -> None:
  """Removes what only an unfinished build needs."""
  for name in ("units", "records"):
    shutil.rmtree(folder / name, ignore_errors=True)
  for name in ("units.json", "plan.json", "hashes.json", "lock"):
    (folder / name).unlink(missing_ok=True)
  for path in folder.glob(".*.tmp.*"):  # of a process that was killed
    path.unlink(missing_ok=True)


def _by_name(
  bad: Sequence[Mapping[str, Any]], planned: plan.Plan
) -> list[dict[str, Any]]:
  names = {str(path): name for name, path in planned.paths.items()}
  return [{**entry, "path": names[entry["path"]]} for entry in bad]


def _adopt_plan(partial: pathlib.Path, planned: plan.Plan) -> None:
  """Writes the plan, or makes sure that it is the one being carried out."""
  found = _read_json(partial / "plan.json")
  if found is not None and found != json.loads(json.dumps(planned.content)):
    changed = [k for k in planned.content if found.get(k) != planned.content[k]]
    raise ValueError(
      f"{partial}: an unfinished build of other data, it differs in"
      f" {', '.join(changed)}; finish it with its own command or remove it"
    )
  text = json.dumps(planned.content, indent=2).encode()
  files.write_atomic(partial / "plan.json", text)


def _reuse(
  out: pathlib.Path, partial: pathlib.Path, planned: plan.Plan
) -> Built:
  """What is there, if it is what would be built."""
  found = packed.open_packed(out, verify_hashes=False)
  if found.manifest.get("plan_sha256") != planned.sha256:
    changed = [
      name
      for name, value in json.loads(json.dumps(planned.content)).items()
      if found.manifest.get(name) != value
    ]
    raise ValueError(
      f"{out}: already holds other data, it differs in {', '.join(changed)};"
      " remove it or choose another folder"
    )
  shutil.rmtree(partial)
  _tidy(out)
  return Built(found, None)


@contextlib.contextmanager
def _locked(partial: pathlib.Path) -> Iterator[None]:
  """One build at a time in a folder; the lock dies with its process."""
  partial.mkdir(parents=True, exist_ok=True)
  with open(partial / "lock", "ab") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise ValueError(f"{partial}: another build is at work here") from error
    yield


def _read_json(path: pathlib.Path) -> Any:
  return json.loads(path.read_bytes()) if path.is_file() else None
