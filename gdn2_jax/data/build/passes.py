"""The two passes of a build, each a function of its task alone.

First pass, once per unit of input: tokenise its documents and write them down
grouped by bucket. Second pass, once per bucket: collect a bucket's documents
from all units, order them, write one shard. A document's key is a hash of the
seed and of where it stands in the input; a bucket is a range of keys and is
ordered by key, so the shards end to end are all documents in an order drawn
uniformly from all orders, while no more than one bucket is in memory.

Every file is renamed into place when it is whole. A unit's or a shard's JSON
record comes last: what has one is done, and is not done again.
"""

import dataclasses
import itertools
import json
import pathlib
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from gdn2_jax.data import files
from gdn2_jax.data.packed import arrays
from gdn2_jax.data.packed import folder as packed
from gdn2_jax.data.text import corpus, readers
from gdn2_jax.data.tokenizer.api import Tokenizer

# Longer documents are tokenised in pieces, which bounds memory and time; they
# stay one document.
LONG_BYTES = 1 << 20

COUNTS = (
  "documents",
  "empty_documents",
  "invalid_utf8_documents",
  "nul_documents",
  "long_documents",
  "tokens",
  "bytes",
  "predicted_bytes",
)

_BATCH_BYTES = 1 << 20
_DOCUMENT = np.dtype([("key", "<u8"), ("length", "<u4")])
# Where a bucket lies in the files of a unit, and checksums of it.
_POINTER = np.dtype(
  [
    ("document", "<i8"),
    ("documents", "<i8"),
    ("token", "<i8"),
    ("tokens", "<i8"),
    ("documents_crc", "<u4"),
    ("tokens_crc", "<u4"),
  ]
)


@dataclasses.dataclass(frozen=True)
class Unit:
  """What one task of the first pass reads.

  Attributes:
    index: number of the unit.
    parts: stretches of files, with the number of each one's file.
    split: the split of all its documents; "" where the text's hash decides.
    size: bytes of text, as the files declare them.
  """

  index: int
  parts: tuple[tuple[int, readers.Part], ...]
  split: str
  size: int


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What both passes need to know; the same for every task of a build.

  Attributes:
    folder: the unfinished folder.
    seed: of the document order.
    buckets: shards of each split.
    validation_fraction: share of documents held out, where no file is.
    skip_bad: leave out and count what cannot be read.
  """

  folder: pathlib.Path
  seed: int
  buckets: dict[str, int]
  validation_fraction: float
  skip_bad: bool

  def unit_path(self, index: int, suffix: str) -> pathlib.Path:
    """A file of a unit; suffix tokens, documents, buckets or json."""
    return self.folder / "units" / f"{index:06d}.{suffix}"

  def shard_record(self, split: str, index: int) -> pathlib.Path:
    """The JSON record of a finished shard."""
    return self.folder / "records" / f"{split}-{index:05d}.json"


def spill_unit(unit: Unit, recipe: Recipe, tokenizer: Tokenizer) -> dict:
  """Tokenises a unit's documents and writes them grouped by bucket.

  Returns:
    The unit's record, counts per split and what was left out; and the seconds
    of CPU that it took, which are not in the record on disk.

  Raises:
    BadInputError: for input that cannot be read, unless it is to be skipped.
  """
  started = time.process_time()
  counts = {split: dict.fromkeys(COUNTS, 0) for split in packed.SPLITS}
  bad: list[readers.Bad] = []
  keys, buckets, ids = [], [], []
  dtype = packed.token_dtype(tokenizer.vocab_size).newbyteorder("<")
  texts = _texts(unit, recipe, bad)
  for batch in _batches(texts, lambda item: len(item.text)):
    encoded = encode_documents([text.text for _, text in batch], tokenizer)
    for (file, text), tokens in zip(batch, encoded, strict=True):
      split = unit.split or _split_of(text.text, recipe.validation_fraction)
      _count(counts[split], text, tokens, tokenizer)
      if not text.text:
        continue
      key = document_key(recipe.seed, file, text.place)
      keys.append(key)
      buckets.append(_bucket(key, split, recipe.buckets))
      ids.append(tokens)
  order = np.argsort(np.asarray(buckets, np.int64), kind="stable")
  documents = np.zeros(len(order), _DOCUMENT)
  documents["key"] = np.asarray(keys, np.uint64)[order]
  documents["length"] = [len(ids[i]) for i in order]
  data = b"".join(ids[i].tobytes() for i in order)
  pointers = _pointers(
    np.asarray(buckets, np.int64)[order],
    sum(recipe.buckets.values()),
    documents,
    data,
    dtype.itemsize,
  )
  record = {
    "counts": counts,
    "bad": [dataclasses.asdict(entry) for entry in bad],
  }
  for suffix, content in (
    ("tokens", data),
    ("documents", documents.tobytes()),
    ("buckets", pointers.tobytes()),
    ("json", json.dumps(record).encode()),
  ):
    files.write_atomic(recipe.unit_path(unit.index, suffix), content)
  return record | {"cpu_seconds": time.process_time() - started}


def merge_bucket(
  split: str, index: int, units: int, recipe: Recipe, dtype: np.dtype
) -> dict[str, Any]:
  """Orders the documents of one bucket and writes them as one shard.

  Args:
    split: "train" or "validation".
    index: of the shard within the split.
    units: how many there are.
    recipe: of the build.
    dtype: of the tokens.

  Returns:
    The record: size and SHA-256 of the shard's files, documents and tokens.

  Raises:
    ValueError: if a file of the first pass was damaged since, by name.
  """
  number = index + (recipe.buckets["train"] if split == "validation" else 0)
  pieces = (_read_piece(unit, number, recipe, dtype) for unit in range(units))
  found = [piece for piece in pieces if piece is not None]
  documents = np.concatenate([np.zeros(0, _DOCUMENT), *(d for d, _ in found)])
  tokens = np.concatenate([np.zeros(0, dtype), *(t for _, t in found)])
  del found
  lengths = documents["length"].astype(np.int64)
  starts = np.cumsum(lengths) - lengths
  order = np.argsort(documents["key"], kind="stable")
  ordered = np.empty_like(tokens)
  at = 0
  for i in order:
    ordered[at : at + lengths[i]] = tokens[starts[i] : starts[i] + lengths[i]]
    at += lengths[i]
  del tokens  # two copies of a shard at a time, never three
  offsets = np.concatenate([[0], np.cumsum(lengths[order])]).astype("<i8")
  record = {"documents": len(order), "tokens": len(ordered), "files": {}}
  for kind, array in (("tokens", ordered), ("offsets", offsets)):
    name, data = arrays.shard_name(split, index, kind), array.tobytes()
    files.write_atomic(recipe.folder / name, data)
    record["files"][name] = {
      "size": len(data),
      "sha256": files.sha256_bytes(data),
    }
  path = recipe.shard_record(split, index)
  files.write_atomic(path, json.dumps(record).encode())
  return record


def document_key(seed: int, file: int, place: int) -> int:
  """A uniform 64-bit number: SHA-256 of the seed and the document's place."""
  return int(files.sha256_bytes(f"{seed}:{file}:{place}".encode())[:16], 16)


def encode_documents(
  texts: list[str], tokenizer: Tokenizer
) -> list[np.ndarray]:
  """Ids of documents, each with its EOS; an empty document gets EOS alone.

  Returns:
    For each text an array [tokens], uint16 or uint32.
  """
  dtype = packed.token_dtype(tokenizer.vocab_size).newbyteorder("<")
  found: list[list[np.ndarray]] = [[] for _ in texts]
  pieces = (
    (index, piece)
    for index, text in enumerate(texts)
    for piece in pieces_of(text)
  )
  # Lists of integers take ten times the memory of arrays: a little at a time.
  for batch in _batches(pieces, len):
    encoded = tokenizer.encode_batch([piece for _, piece in batch])
    for (index, _), ids in zip(batch, encoded, strict=True):
      assert not ids or (min(ids) >= 0 and max(ids) < tokenizer.vocab_size)
      found[index].append(np.asarray(ids, dtype))
  end = np.asarray([tokenizer.eos_id], dtype)
  return [np.concatenate([*parts, end]) for parts in found]


def pieces_of(text: str, limit: int = LONG_BYTES) -> list[str]:
  """A text in pieces of at most `limit` characters, cut before white space.

  Joined they are the text; most texts are one piece. Around a cut the tokens
  may differ from those of the whole.
  """
  pieces = []
  start = 0
  while len(text) - start > limit:
    stop = start + limit
    # A word longer than this is no word.
    tail = text[max(start + 1, stop - 1000) : stop]
    spaces = [i for i, char in enumerate(tail) if char.isspace()]
    if spaces:
      stop -= len(tail) - spaces[-1]
    pieces.append(text[start:stop])
    start = stop
  if start < len(text):
    pieces.append(text[start:])
  return pieces


def _texts(
  unit: Unit, recipe: Recipe, bad: list[readers.Bad]
) -> Iterator[tuple[int, readers.Text]]:
  skip = bad.append if recipe.skip_bad else None
  for file, part in unit.parts:
    for text in readers.read_part(part, skip):
      yield file, text


def _batches(
  pairs: Iterable[tuple[int, Any]], size_of: Callable[[Any], int]
) -> Iterator[list[tuple[int, Any]]]:
  """Pairs of a number and an item, up to `_BATCH_BYTES` of items at a time."""
  batch, size = [], 0
  for pair in pairs:
    batch.append(pair)
    size += size_of(pair[1])
    if size >= _BATCH_BYTES:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


def _split_of(text: str, fraction: float) -> str:
  held_out = corpus.is_held_out(files.sha256_bytes(text.encode()), fraction)
  return "validation" if held_out else "train"


def _count(
  counts: dict[str, int],
  text: readers.Text,
  tokens: np.ndarray,
  tokenizer: Tokenizer,
) -> None:
  if not text.text:
    counts["empty_documents"] += 1
    return
  size = len(text.text.encode())
  counts["documents"] += 1
  counts["invalid_utf8_documents"] += text.is_invalid_utf8
  counts["nul_documents"] += "\0" in text.text
  counts["long_documents"] += len(text.text) > LONG_BYTES
  counts["tokens"] += len(tokens)
  counts["bytes"] += size
  counts["predicted_bytes"] += size - tokenizer.first_token_bytes(tokens[0])


def _bucket(key: int, split: str, buckets: dict[str, int]) -> int:
  """Number of a bucket, those of validation after those of train."""
  within = key * buckets[split] >> 64
  return within + (buckets["train"] if split == "validation" else 0)


def _pointers(
  buckets: np.ndarray,
  count: int,
  documents: np.ndarray,
  data: bytes,
  itemsize: int,
) -> np.ndarray:
  """One `_POINTER` per bucket; `buckets` is that of each document, sorted."""
  pointers = np.zeros(count, _POINTER)
  ends = np.concatenate([[0], np.cumsum(documents["length"], dtype=np.int64)])
  borders = np.searchsorted(buckets, np.arange(count + 1))
  for number, (first, stop) in enumerate(itertools.pairwise(borders)):
    low, high = ends[first], ends[stop]
    pointers[number] = (
      first,
      stop - first,
      low,
      high - low,
      zlib.crc32(documents[first:stop].tobytes()),
      zlib.crc32(memoryview(data)[low * itemsize : high * itemsize]),
    )
  return pointers


def _read_piece(
  unit: int, number: int, recipe: Recipe, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray] | None:
  """Documents and tokens of a bucket in one unit; None if there are none."""
  path = recipe.unit_path(unit, "buckets")
  (where,) = _read(path, _POINTER, number, 1)
  if where["documents"] == 0:
    return None
  found = []
  for kind, suffix, first, count in (
    (_DOCUMENT, "documents", "document", "documents"),
    (dtype, "tokens", "token", "tokens"),
  ):
    path = recipe.unit_path(unit, suffix)
    array = _read(path, kind, int(where[first]), int(where[count]))
    if zlib.crc32(array.tobytes()) != where[f"{suffix}_crc"]:
      raise ValueError(
        f"{path}: damaged since it was written; remove {path.with_suffix('')}.*"
        " and run the command again"
      )
    found.append(array)
  return found[0], found[1]


def _read(
  path: pathlib.Path, kind: np.dtype, first: int, count: int
) -> np.ndarray:
  with open(path, "rb") as file:
    file.seek(first * kind.itemsize)
    return np.fromfile(file, kind, count)
