"""Plan of a build: everything that decides the bytes of its result.

The plan names the inputs by SHA-256, the split, the seed, the tokenizer and
where inputs are cut into shards. Two builds of one plan are equal, and a build
may only be resumed under its own plan.
"""

import collections
import concurrent.futures
import dataclasses
import fnmatch
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import tqdm

from gdn2_jax import files
from gdn2_jax.data.packed import folder as packed
from gdn2_jax.data.text import corpus, readers
from gdn2_jax.data.tokenizer.api import Tokenizer, open_tokenizer
from gdn2_jax.data.tokenizer.documents import pieces_of, token_dtype

SHARD_TOKENS = 1 << 27
# Small inputs get smaller shards, so that all workers have one; not below this
# many bytes of text, which take about two seconds.
SHARD_BYTES = 8 << 20
_MOST_SHARDS = 256  # of an input whose shards are not of full size
# A bpe-N is trained on the beginning of the training text.
_TRAIN_CHARS = 16 << 20


@dataclasses.dataclass(frozen=True)
class Inputs:
  """Files of a build, their origin and checksums.

  Attributes:
    paths: name -> file; the names go into the manifest and their order
      decides the result, not where the files lie.
    source: origin of the text, for the manifest.
    options: fields of `Options`.
    checksums: name -> SHA-256 that the file must have.
  """

  paths: dict[str, pathlib.Path]
  source: dict[str, Any]
  options: dict[str, Any] = dataclasses.field(default_factory=dict)
  checksums: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Choices that decide the result besides the files.

  Attributes:
    tokenizer: "bytes", "bpe-N", or the path of a tokenizer.json or
      tokenizer.model.
    seed: seed of the order of documents within a shard.
    order: hashed with the seed to order documents: the "place" of a document
      in the input, or its "text".
    validation_files: names or patterns of input files that are held out
      whole; () holds out by document.
    validation_fraction: expected share of documents held out by the hash of
      their text, where no file is.
    shard_tokens: about how many tokens a shard gets at most.
    skip_bad: leave out and count what cannot be read, instead of stopping.
  """

  tokenizer: str = "bpe-4096"
  seed: int = 0
  order: str = "place"
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
class Task:
  """Input of one shard.

  Attributes:
    index: number of the shard in its split.
    parts: stretches of files, with the number of each one's file.
    split: the split of all its documents; "" where the text's hash decides,
      which makes a shard of that index in both splits.
  """

  index: int
  parts: tuple[tuple[int, readers.Part], ...]
  split: str

  @property
  def size(self) -> int:
    """Bytes of text, as the files declare them."""
    return sum(part.size for _, part in self.parts)

  def split_of(self, text_sha256: str, fraction: float) -> str:
    """Split of a document of this task, given by the hash of its text."""
    if self.split:
      return self.split
    held_out = corpus.is_held_out(text_sha256, fraction)
    return "validation" if held_out else "train"


@dataclasses.dataclass(frozen=True)
class Plan:
  """A plan and what it takes to carry it out.

  Attributes:
    content: goes into the manifest; decides the result.
    paths: input name -> its file on this machine.
    tasks: the shards to make.
    tokenizer: gives the ids.
  """

  content: dict[str, Any]
  paths: dict[str, pathlib.Path]
  tasks: list[Task]
  tokenizer: Tokenizer


def make_plan(
  inputs: Inputs,
  folder: pathlib.Path,
  options: Options,
  *,
  workers: int,
  bar: Callable[..., tqdm.tqdm],
) -> Plan:
  """Plans a build in its unfinished folder; see `build_rows` for the rest."""
  paths = inputs.paths
  held_out = _held_out(list(paths), options.validation_files)
  shard_bytes = _shard_bytes(paths, options)
  parts, skipped = {}, []

  def leave_out(name: str, reason: str) -> None:
    if not options.skip_bad:
      raise readers.BadInputError(
        f"{paths[name]}: {reason}; --skip_bad_shards leaves it out"
      )
    skipped.append({"path": name, "reason": reason})

  for name, path in paths.items():
    try:
      parts[name] = readers.cut_into_parts(path, shard_bytes)
    except readers.BadInputError as error:
      leave_out(name, str(error).removeprefix(f"{path}: "))
  digests = _hash_inputs({n: paths[n] for n in parts}, folder, workers, bar)
  for name, digest in digests.items():
    expected = inputs.checksums.get(name, digest)
    if digest != expected:
      leave_out(name, f"sha256 {digest}, expected {expected}")
      del parts[name]
  if not parts:
    raise ValueError(f"none of the {len(paths)} input files can be read")
  split_of = {name: _split(name, held_out, options) for name in parts}
  tasks = _tasks(parts, shard_bytes, split_of)
  tokenizer = open_tokenizer(
    options.tokenizer, train_texts=_leading_texts(tasks, options)
  )
  content = {
    "format": packed.FORMAT,
    "version": packed.VERSION,
    "source": dict(inputs.source),
    "inputs": [
      {
        "name": name,
        "size": paths[name].stat().st_size,
        "sha256": digests[name],
        "split": split,
      }
      for name, split in split_of.items()
    ],
    "skipped": skipped,
    "seed": options.seed,
    "order": f"within a shard by SHA-256 of seed and {options.order}",
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
    "dtype": token_dtype(tokenizer.vocab_size).name,
    "skip_bad_shards": options.skip_bad,
    "shard_bytes": shard_bytes,
  }
  return Plan(content, {n: paths[n] for n in parts}, tasks, tokenizer)


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


def _split(name: str, held_out: set[str], options: Options) -> str:
  if held_out:
    return "validation" if name in held_out else "train"
  return "" if options.validation_fraction else "train"


def _shard_bytes(paths: Mapping[str, pathlib.Path], options: Options) -> int:
  size = sum(p.stat().st_size for p in paths.values() if p.is_file())
  # Below what any tokenizer of English makes of a byte: shards come out
  # smaller than asked for rather than larger.
  per_token = 1 if options.tokenizer == "bytes" else 3
  largest = options.shard_tokens * per_token
  return min(max(SHARD_BYTES, size // _MOST_SHARDS), largest)


def _hash_inputs(
  paths: Mapping[str, pathlib.Path],
  folder: pathlib.Path,
  workers: int,
  bar: Callable[..., tqdm.tqdm],
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
  total = sum(stamps[name][1] for name in left)
  with (
    bar(desc="hash inputs", total=total) as progress,
    concurrent.futures.ThreadPoolExecutor(max(workers, 1)) as pool,
  ):
    digests = pool.map(files.sha256_file, [paths[name] for name in left])
    for name, digest in zip(left, digests, strict=True):
      known[name] = [*stamps[name], digest]
      if stamps[name][1] > 1 << 28 or name == left[-1]:
        files.write_atomically(memory, json.dumps(known).encode())
      progress.update(stamps[name][1])
  return {name: known[name][-1] for name in paths}


def _tasks(
  parts: Mapping[str, list[readers.Part]],
  shard_bytes: int,
  split_of: Mapping[str, str],
) -> list[Task]:
  """Neighbouring parts of one split, joined up to about a shard's size."""
  groups: list[tuple[str, list[tuple[int, readers.Part]]]] = []
  last, room = None, 0
  for number, (name, own) in enumerate(parts.items()):
    if split_of[name] != last:
      last, room = split_of[name], -1
    for part in own:
      if part.size > room:
        groups.append((last, []))
        room = shard_bytes
      groups[-1][1].append((number, part))
      room -= part.size
  numbers = collections.defaultdict(itertools.count)
  return [
    Task(next(numbers[split]), tuple(members), split)
    for split, members in groups
  ]


def _leading_texts(tasks: list[Task], options: Options) -> Iterator[str]:
  """The first training texts, up to `_TRAIN_CHARS`, for a bpe-N."""
  room = _TRAIN_CHARS
  for task in tasks:
    if task.split == "validation":
      continue
    for _, part in task.parts:
      for item in readers.read_part(part, lambda bad: None):
        digest = files.sha256_bytes(item.text.encode())
        if task.split_of(digest, options.validation_fraction) != "train":
          continue
        yield from pieces_of(item.text[:room])
        room -= len(item.text)
        if room <= 0:
          return
