"""Builds of packed folders: plan, one pass over the input, one rename.

  plan     hash the inputs, fix every number of the build       (recipe.py)
  shards   tokenise and write each, in parallel                  (shard.py)
  publish  manifest, then one rename

Everything happens in OUT.partial and is a function of the plan alone: a build
that was killed goes on where it was when the same command runs again, and ends
with the same bytes as one that was not.
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

import tqdm

from gdn2_jax import files
from gdn2_jax.data.build import recipe, shard
from gdn2_jax.data.build.workers import run_tasks
from gdn2_jax.data.packed import folder as packed

_NO_BAR = functools.partial(tqdm.tqdm, disable=True)


@dataclasses.dataclass(frozen=True)
class Rates:
  """Work of one run of a build, its CPU time and its wall time."""

  documents: int
  tokens: int
  bytes: int
  cpu_seconds: float
  seconds: float


@dataclasses.dataclass(frozen=True)
class Built:
  """The result of `build_rows`; `rates` is None if nothing was left to do."""

  packed: packed.Packed
  rates: Rates | None


def build_rows(
  inputs: recipe.Inputs,
  out: str | os.PathLike[str],
  options: recipe.Options,
  *,
  workers: int = 0,
  wait: bool = False,
  bar: Callable[..., tqdm.tqdm] = _NO_BAR,
  say: Callable[[str], None] = lambda line: None,
) -> Built:
  """Packs files into a folder that appears whole or not at all.

  Args:
    inputs: files and their origin.
    out: the folder to make; may exist if it holds the same data.
    options: what decides the result besides the files.
    workers: processes; 0 works in the caller's, which decides nothing.
    wait: wait for another build of this folder, instead of refusing.
    bar: makes a progress bar; none is shown by default.
    say: is told about what is resumed or left out.

  Raises:
    ValueError: for unreadable input, by file and place; for a folder that
      holds something else, or that another build is working on.
    RuntimeError: if a worker process died.
  """
  out = pathlib.Path(out)
  bar = functools.partial(bar, unit="B", unit_scale=True)
  taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
  if taken and not (out / "manifest.json").is_file():
    raise ValueError(f"{out}: exists and is not a packed folder")
  partial = out.with_name(out.name + ".partial")
  made = not partial.exists()
  with _locked(partial, wait):
    for path in partial.rglob(".*.tmp.*"):  # of a build that was killed
      path.unlink(missing_ok=True)
    try:
      plan = recipe.make_plan(
        inputs, partial, options, workers=workers, bar=bar
      )
      for entry in plan.content["skipped"]:
        say(f"left out {entry['path']}: {entry['reason']}")
      if (out / "manifest.json").is_file():
        return _reuse(out, partial, plan)
    except ValueError:
      if made:
        shutil.rmtree(partial, ignore_errors=True)
      raise
    _adopt_plan(partial, plan)
    (partial / shard.RECORDS).mkdir(exist_ok=True)
    if finished := len(list((partial / shard.RECORDS).glob("*.json"))):
      say(f"resuming: {finished} of {len(plan.tasks)} shards are done")
    shared = (partial, options, plan.tokenizer)
    records, rates = _run(plan, shared, workers, bar)
    for record in records:
      for entry in record["bad"]:
        say(f"left out {entry['path']}: {entry['where']}: {entry['reason']}")
    _publish(partial, out, plan, records)
  return Built(packed.open_packed(out, verify_hashes=False), rates)


def _run(
  plan: recipe.Plan,
  shared: tuple[Any, ...],
  workers: int,
  bar: Callable[..., tqdm.tqdm],
) -> tuple[list[dict[str, Any]], Rates]:
  """Makes all shards; their records in the order of the plan."""
  started = time.perf_counter()
  done = {"documents": 0, "tokens": 0, "bytes": 0, "cpu_seconds": 0.0}
  records = {}
  total = sum(task.size for task in plan.tasks)
  with (
    bar(desc="tokenize", total=total) as progress,
    contextlib.closing(
      run_tasks(shard.write_shard, plan.tasks, shared, workers)
    ) as results,
  ):
    for task, record in results:
      progress.update(task.size)
      records[task] = record
      if (seconds := record.pop("cpu_seconds", None)) is None:
        continue  # made by an earlier run
      done["cpu_seconds"] += seconds
      for counts in record["counts"].values():
        for name in ("documents", "tokens", "bytes"):
          done[name] += counts[name]
  rates = Rates(**done, seconds=time.perf_counter() - started)
  return [records[task] for task in plan.tasks], rates


def _publish(
  partial: pathlib.Path,
  out: pathlib.Path,
  plan: recipe.Plan,
  records: Sequence[Mapping[str, Any]],
) -> None:
  splits = {}
  for split in packed.SPLITS:
    own = [record for record in records if split in record["counts"]]
    counts = {
      name: sum(record["counts"][split][name] for record in own)
      for name in packed.COUNTS
    }
    every = {k: v for r in own for k, v in r["files"][split].items()}
    splits[split] = counts | {"shards": len(own), "files": every}
  if splits["train"]["documents"] == 0:
    raise ValueError(f"no training text in {len(plan.paths)} files")
  names = {str(path): name for name, path in plan.paths.items()}
  bad = [
    {**entry, "path": names[entry["path"]]}
    for record in records
    for entry in record["bad"]
  ]
  manifest = plan.content | {"bad_parts": bad, "splits": splits}
  plan.tokenizer.save(partial / "tokenizer.json")
  text = json.dumps(manifest, indent=2) + "\n"
  files.write_atomically(partial / "manifest.json", text.encode())
  # Renamed first and tidied after: a kill in between loses no work.
  files.sync_folder(partial)
  try:
    os.rename(partial, out)
  except OSError as error:
    raise ValueError(f"{out}: appeared while it was being built") from error
  files.sync_folder(out.parent)
  _tidy(out)


def _tidy(folder: pathlib.Path) -> None:
  """Removes what only an unfinished build needs."""
  shutil.rmtree(folder / shard.RECORDS, ignore_errors=True)
  for name in ("plan.json", "hashes.json", "lock"):
    (folder / name).unlink(missing_ok=True)


def _adopt_plan(partial: pathlib.Path, plan: recipe.Plan) -> None:
  """Writes the plan; refuses a folder with another one."""
  path = partial / "plan.json"
  text = json.dumps(plan.content, indent=2)
  if path.is_file() and (
    changed := _differences(json.loads(path.read_bytes()), plan)
  ):
    raise ValueError(
      f"{partial}: an unfinished build of other data, it differs in {changed};"
      " finish it with its own command or remove it"
    )
  files.write_atomically(path, text.encode())


def _reuse(
  out: pathlib.Path, partial: pathlib.Path, plan: recipe.Plan
) -> Built:
  """Opens a finished folder of the same plan; refuses another."""
  found = packed.open_packed(out, verify_hashes=False)
  if changed := _differences(found.manifest, plan):
    raise ValueError(
      f"{out}: already holds other data, it differs in {changed}; remove it or"
      " choose another folder"
    )
  shutil.rmtree(partial, ignore_errors=True)
  _tidy(out)
  return Built(found, None)


def _differences(found: Mapping[str, Any], plan: recipe.Plan) -> str:
  """Names of the fields of a plan or manifest that differ from this plan."""
  wanted = json.loads(json.dumps(plan.content))
  return ", ".join(k for k in wanted if found.get(k) != wanted[k])


@contextlib.contextmanager
def _locked(partial: pathlib.Path, wait: bool) -> Iterator[None]:
  """One build at a time in a folder; the lock dies with its process."""
  path = partial / "lock"
  how = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
  while True:
    partial.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
      try:
        file = stack.enter_context(open(path, "ab"))
        fcntl.flock(file, how)
        if os.fstat(file.fileno()).st_ino != path.stat().st_ino:
          continue
      except FileNotFoundError:
        continue  # another build published the folder in the meantime
      except BlockingIOError as error:
        message = f"{partial}: another build is at work here"
        raise ValueError(message) from error
      except OSError as error:
        raise ValueError(
          f"{partial}: cannot be locked ({error}); choose another folder"
        ) from error
      yield
      return
