"""Recipe of a build, fixed before it starts.

The plan holds everything that decides the bytes of the result: the inputs by
SHA-256, the split, the seed, the tokenizer, the number of shards. Two builds
of one plan are equal, and a build may only be resumed under its own plan.
"""

import concurrent.futures
import contextlib
import dataclasses
import fnmatch
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gdn2_jax.data import files
from gdn2_jax.data.build import passes
from gdn2_jax.data.packed import folder as packed
from gdn2_jax.data.text import corpus, readers
from gdn2_jax.data.tokenizer.api import Tokenizer, open_tokenizer

SHARD_TOKENS = 1 << 27
# Of text in a unit: at least, and at most. What a build does between its passes
# grows with units times shards, so more input makes larger units.
UNIT_BYTES = 8 << 20
MAX_UNIT_BYTES = 256 << 20
# A bpe-N is trained on the beginning of the training text.
TRAIN_BYTES = 16 << 20

_SHUFFLE = "every document by SHA-256 of seed, file and place"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What decides the result besides the files.

  Attributes:
    tokenizer: "bytes", "bpe-N", or the path of a tokenizer.json or
      tokenizer.model.
    seed: of the document order.
    validation_files: names or patterns of input files that are held out
      whole; () holds out by document.
    validation_fraction: expected share of documents held out by the hash of
      their text, where no file is.
    shard_tokens: about how many tokens a shard gets.
    skip_bad: leave out and count what cannot be read, instead of stopping.
  """

  tokenizer: str = "bpe-4096"
  seed: int = 0
  validation_files: tuple[str, ...] = ()
  validation_fraction: float = 0.1
  shard_tokens: int = SHARD_TOKENS
  skip_bad: bool = False

  def __post_init__(self):
    if not 0 <= self.validation_fraction < 1:
      raise ValueError(
        f"validation_fraction={self.validation_fraction}: expected 0 <= f < 1"
      )
    if self.shard_tokens < 1:
      raise ValueError(f"shard_tokens={self.shard_tokens}: expected at least 1")
    if self.seed < 0:
      raise ValueError(f"seed={self.seed}: expected at least 0")


@dataclasses.dataclass(frozen=True)
class Plan:
  """A plan and what it takes to carry it out.

  Attributes:
    content: goes into the manifest; decides the result.
    paths: input name -> where it lies on this machine.
    units: tasks of the first pass.
    recipe: what both passes need.
    tokenizer: gives the ids.
  """

  content: dict[str, Any]
  paths: dict[str, pathlib.Path]
  units: list[passes.Unit]
  recipe: passes.Recipe
  tokenizer: Tokenizer

  @property
  def sha256(self) -> str:
    """Hex SHA-256 of the content."""
    return files.sha256_bytes(json.dumps(self.content).encode())


def make_plan(
  paths: Mapping[str, pathlib.Path],
  folder: pathlib.Path,
  options: Options,
  *,
  source: Mapping[str, Any],
  checksums: Mapping[str, str],
  workers: int,
  bar: Callable[[str, str, int], Any],
) -> Plan:
  """Reads enough of the inputs to know the whole build.

  Args:
    paths: name -> file, in the order that decides the result.
    folder: of the unfinished build, where hashes are remembered.
    options: of the build.
    source: where the files come from, for the manifest.
    checksums: name -> SHA-256 that the file must have.
    workers: threads that hash, at least one.
    bar: makes a progress bar of (label, unit, total).

  Raises:
    ValueError: for an input that is missing, damaged or has no text, for a
      file to hold out that is not there, or an unusable tokenizer.
  """
  held_out = _held_out(list(paths), options.validation_files)
  unit_bytes = _unit_bytes(paths)
  usable, parts, skipped = _survey(paths, unit_bytes, options.skip_bad)
  digests = _hash_inputs(usable, folder, workers, bar)
  for name in list(usable):
    expected = checksums.get(name, digests[name])
    if digests[name] != expected:
      reason = f"sha256 {digests[name]}, expected {expected}"
      if not options.skip_bad:
        raise readers.BadInputError(f"{paths[name]}: {reason}")
      skipped.append({"path": name, "reason": reason})
      del usable[name], parts[name]
  units, sizes = _units(parts, unit_bytes, held_out, options)
  tokenizer = _tokenizer(units, options)
  buckets = {split: _buckets(sizes[split], options) for split in packed.SPLITS}
  content = {
    "format": packed.FORMAT,
    "version": packed.SHARDED_VERSION,
    "source": dict(source),
    "inputs": [
      {
        "name": name,
        "size": path.stat().st_size,
        "sha256": digests[name],
        "split": _split(name, held_out),
      }
      for name, path in usable.items()
    ],
    "skipped": skipped,
    "seed": options.seed,
    "shuffle": _SHUFFLE,
    "validation": (
      {"files": sorted(held_out)}
      if held_out
      else {"fraction": options.validation_fraction}
    ),
    "eos_policy": packed.EOS_POLICY,
    "bos_policy": packed.BOS_POLICY,
    "tokenizer": {
      "spec": options.tokenizer,
      "sha256": tokenizer.sha256,
      "vocab_size": tokenizer.vocab_size,
      "eos_id": tokenizer.eos_id,
    },
    "dtype": packed.token_dtype(tokenizer.vocab_size).name,
    "skip_bad_shards": options.skip_bad,
    "unit_bytes": unit_bytes,
    "buckets": buckets,
  }
  recipe = passes.Recipe(
    folder=folder,
    seed=options.seed,
    buckets=buckets,
    validation_fraction=options.validation_fraction,
    skip_bad=options.skip_bad,
  )
  return Plan(content, dict(usable), units, recipe, tokenizer)


def _held_out(names: list[str], patterns: tuple[str, ...]) -> set[str]:
  found: set[str] = set()
  for pattern in patterns:
    matching = {
      name
      for name in names
      if fnmatch.fnmatchcase(name, pattern)
      or fnmatch.fnmatchcase(name.rpartition("/")[2], pattern)
    }
    if not matching:
      raise ValueError(
        f"validation_files={pattern!r}: none of the {len(names)} input files,"
        f" {', '.join(names[:3])}, ..."
      )
    found |= matching
  if found and len(found) == len(names):
    raise ValueError(
      f"validation_files={','.join(patterns)!r}: nothing is left to train on"
    )
  return found


def _split(name: str, held_out: set[str]) -> str:
  if not held_out:
    return ""
  return "validation" if name in held_out else "train"


def _unit_bytes(paths: Mapping[str, pathlib.Path]) -> int:
  size = sum(p.stat().st_size for p in paths.values() if p.is_file())
  return min(max(UNIT_BYTES, size // 1024), MAX_UNIT_BYTES)


def _survey(
  paths: Mapping[str, pathlib.Path], unit_bytes: int, skip_bad: bool
) -> tuple[dict[str, pathlib.Path], dict[str, list], list[dict[str, str]]]:
  """Which files can be read, their parts, and what is wrong with the others."""
  usable, parts, skipped = {}, {}, []
  for name, path in paths.items():
    try:
      parts[name] = readers.cut_into_parts(path, unit_bytes)
      usable[name] = path
    except readers.BadInputError as error:
      if not skip_bad:
        raise readers.BadInputError(
          f"{error}; --skip_bad_shards leaves it out"
        ) from error
      reason = str(error).removeprefix(f"{path}: ")
      skipped.append({"path": name, "reason": reason})
  if not usable:
    raise ValueError(f"none of the {len(paths)} input files can be read")
  return usable, parts, skipped


def _hash_inputs(
  paths: Mapping[str, pathlib.Path],
  folder: pathlib.Path,
  workers: int,
  bar: Callable[[str, str, int], Any],
) -> dict[str, str]:
  """SHA-256 of the files; known ones of unchanged size and time are kept."""
  memory = folder / "hashes.json"
  known = json.loads(memory.read_bytes()) if memory.is_file() else {}
  stamps = {
    name: [str(path.resolve()), status.st_size, status.st_mtime_ns]
    for name, path in paths.items()
    for status in [path.stat()]
  }
  left = [n for n in paths if known.get(n, [None])[:-1] != stamps[n]]
  progress = bar("hash inputs", "B", sum(stamps[n][1] for n in left))
  with (
    contextlib.closing(progress),
    concurrent.futures.ThreadPoolExecutor(max(workers, 1)) as pool,
  ):
    digests = pool.map(files.sha256_file, [paths[name] for name in left])
    for name, digest in zip(left, digests, strict=True):
      known[name] = [*stamps[name], digest]
      if stamps[name][1] > 1 << 28 or name == left[-1]:
        files.write_atomic(memory, json.dumps(known).encode())
      progress.update(stamps[name][1])
  return {name: known[name][-1] for name in paths}


def _units(
  parts: Mapping[str, list[readers.Part]],
  unit_bytes: int,
  held_out: set[str],
  options: Options,
) -> tuple[list[passes.Unit], dict[str, int]]:
  """Tasks of the first pass, and the bytes of text of each split."""
  numbers = {name: number for number, name in enumerate(parts)}
  units: list[passes.Unit] = []
  sizes = dict.fromkeys(packed.SPLITS, 0)
  for split, names in itertools.groupby(
    parts, lambda name: _split(name, held_out)
  ):
    owner = [(numbers[name], part) for name in names for part in parts[name]]
    groups = readers.group_parts([part for _, part in owner], unit_bytes)
    flat = iter(owner)
    for group in groups:
      members = tuple(itertools.islice(flat, len(group)))
      size = sum(part.size for part in group)
      units.append(passes.Unit(len(units), members, split, size))
      if split:
        sizes[split] += size
      else:
        kept = round(size * options.validation_fraction)
        sizes["validation"] += kept
        sizes["train"] += size - kept
  return units, sizes


def _buckets(size: int, options: Options) -> int:
  # Below what any tokenizer of English makes of a byte: shards come out
  # smaller than asked for rather than larger.
  per_token = 1.0 if options.tokenizer == "bytes" else 3.0
  return max(1, round(size / per_token / options.shard_tokens))


def _tokenizer(units: list[passes.Unit], options: Options) -> Tokenizer:
  if not options.tokenizer.startswith("bpe-"):
    return open_tokenizer(options.tokenizer)
  return open_tokenizer(
    options.tokenizer, train_texts=_leading_texts(units, options)
  )


def _leading_texts(units: list[passes.Unit], options: Options) -> Iterator[str]:
  """The first training texts, up to `TRAIN_BYTES` characters."""
  room = TRAIN_BYTES
  for unit in units:
    if unit.split == "validation":
      continue
    for _, part in unit.parts:
      for item in readers.read_part(part, lambda bad: None):
        digest = files.sha256_bytes(item.text.encode())
        if not unit.split and corpus.is_held_out(
          digest, options.validation_fraction
        ):
          continue
        yield from passes.pieces_of(item.text[:room])
        room -= len(item.text)
        if room <= 0:
          return


def input_names(
  source: str | os.PathLike[str],
) -> dict[str, pathlib.Path]:
  """Name -> path of the files of a folder, by their place in the folder."""
  root = pathlib.Path(source)
  found = readers.find_files(root)
  base = root if root.is_dir() else root.parent
  return {path.relative_to(base).as_posix(): path for path in found}
