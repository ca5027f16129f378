"""One shard of a build: a stretch of the input, tokenised and written.

A shard is a function of its task alone, whoever computes it and in whatever
order. Its files are renamed into place when they are whole; its JSON record,
with their hashes, comes last. A record whose files fit is not computed again.
"""

import dataclasses
import json
import pathlib
import time
from typing import Any

import numpy as np

from gdn2_jax import files
from gdn2_jax.data.build.recipe import Options, Task
from gdn2_jax.data.packed import folder as packed
from gdn2_jax.data.text import readers
from gdn2_jax.data.tokenizer.base import Tokenizer
from gdn2_jax.data.tokenizer.documents import (
  LONG_CHARS,
  batches_of,
  encode_documents,
)

RECORDS = "records"


def write_shard(
  task: Task, folder: pathlib.Path, options: Options, tokenizer: Tokenizer
) -> dict[str, Any]:
  """Tokenises the text of a task and writes a shard of each of its splits.

  Returns:
    The record: counts and files per split, and what was left out. One that was
    computed now, not found, also has "cpu_seconds", which is not on disk.

  Raises:
    BadInputError: for input that cannot be read, unless it is to be skipped.
  """
  started = time.process_time()
  path = folder / RECORDS / f"{task.split or 'both'}-{task.index:05d}.json"
  if (found := _finished(path, folder)) is not None:
    return found
  splits = (task.split,) if task.split else packed.SPLITS
  counts = {split: dict.fromkeys(packed.COUNTS, 0) for split in splits}
  documents: dict[str, list] = {split: [] for split in splits}
  bad: list[readers.Bad] = []
  skip = bad.append if options.skip_bad else None
  texts = (
    (item.text, (file, item))
    for file, part in task.parts
    for item in readers.read_part(part, skip)
  )
  for batch in batches_of(texts):
    encoded = encode_documents([text for text, _ in batch], tokenizer)
    for (text, (file, item)), tokens in zip(batch, encoded, strict=True):
      digest = files.sha256_bytes(text.encode())
      split = task.split_of(digest, options.validation_fraction)
      _count(counts[split], item, tokens, tokenizer)
      if text:
        place = digest if options.order == "text" else f"{file}:{item.place}"
        documents[split].append((document_key(options.seed, place), tokens))
  record = {
    "counts": counts,
    "bad": [dataclasses.asdict(entry) for entry in bad],
    "files": {
      split: _write(folder, split, task.index, documents[split])
      for split in splits
    },
  }
  files.write_atomically(path, json.dumps(record).encode())
  return record | {"cpu_seconds": time.process_time() - started}


def document_key(seed: int, identity: str) -> str:
  """Key that documents of a shard are ordered by: a hash, so a shuffle."""
  return files.sha256_bytes(f"{seed}:{identity}".encode())


def _finished(
  record: pathlib.Path, folder: pathlib.Path
) -> dict[str, Any] | None:
  """A record from an earlier run, if the files it names are undamaged."""
  if not record.is_file():
    return None
  found = json.loads(record.read_bytes())
  for entries in found["files"].values():
    for name, entry in entries.items():
      path = folder / name
      if not path.is_file() or files.sha256_file(path) != entry["sha256"]:
        return None
  return found


def _count(
  counts: dict[str, int],
  item: readers.Text,
  tokens: np.ndarray,
  tokenizer: Tokenizer,
) -> None:
  if not item.text:
    counts["empty_documents"] += 1
    return
  size = len(item.text.encode())
  counts["documents"] += 1
  counts["invalid_utf8_documents"] += item.is_invalid_utf8
  counts["nul_documents"] += "\0" in item.text
  counts["long_documents"] += len(item.text) > LONG_CHARS
  counts["tokens"] += len(tokens)
  counts["bytes"] += size
  counts["predicted_bytes"] += size - tokenizer.first_token_bytes(tokens[0])


def _write(
  folder: pathlib.Path,
  split: str,
  index: int,
  documents: list[tuple[str, np.ndarray]],
) -> dict[str, dict[str, Any]]:
  """Size and SHA-256 of the two files of a shard, by name."""
  documents.sort(key=lambda document: document[0])
  lengths = [len(tokens) for _, tokens in documents]
  content = {
    "tokens": b"".join(tokens for _, tokens in documents),
    "offsets": np.cumsum([0, *lengths], dtype="<i8").tobytes(),
  }
  entries = {}
  for kind, data in content.items():
    name = packed.shard_name(split, index, kind)
    files.write_atomically(folder / name, data)
    entries[name] = {"size": len(data), "sha256": files.sha256_bytes(data)}
  return entries
