"""Readers of parquet, jsonl, txt and ArrayRecord files, part by part.

A part is what one reader takes at a time: some row groups of a parquet file,
a range of bytes of a jsonl file, some records of an ArrayRecord file of TFDS,
or a whole txt file (one document). A file is cut the same way every time,
whoever reads it. What cannot be read is an error that names it, or is left out
and counted where the caller says so.

Text is bytes until it is decoded here: what is not UTF-8 becomes U+FFFD and is
counted, because a strict reader would lose the file and a lax one the trace.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

SUFFIXES = (".parquet", ".jsonl", ".txt")
_ARRAY_RECORD = ".array_record"  # as in NAME-train.array_record-00000-of-00001
PART_BYTES = 64 << 20  # of text, unless the caller says otherwise

_SURROGATES = re.compile("[\ud800-\udfff]+")


class BadInputError(ValueError):
  """A file, or a place in one, that cannot be read."""


@dataclasses.dataclass(frozen=True)
class Part:
  """A stretch of one file.

  Attributes:
    path: the file.
    first: first row group, record or byte.
    stop: after the last row group, record or byte.
    row: number of the first document for parquet.
    size: bytes of text, as the file declares them.
  """

  path: str
  first: int
  stop: int
  row: int
  size: int


@dataclasses.dataclass(frozen=True)
class Text:
  """One document: its place in the file and its text."""

  place: int
  text: str
  is_invalid_utf8: bool


@dataclasses.dataclass(frozen=True)
class Bad:
  """A place that cannot be read, and the reason."""

  path: str
  where: str
  reason: str
  documents: int


def find_files(source: str | pathlib.Path) -> dict[str, pathlib.Path]:
  """Readable files of a folder, at any depth, or one file: name -> path."""
  root = pathlib.Path(source)
  paths = sorted(root.rglob("*")) if root.is_dir() else [root]
  base = root if root.is_dir() else root.parent
  found = {
    path.relative_to(base).as_posix(): path
    for path in paths
    if path.suffix in SUFFIXES and path.is_file()
  }
  if not found:
    raise ValueError(
      f"source={str(source)!r}: expected a {', '.join(SUFFIXES)} file, or a"
      " folder that holds some"
    )
  return found


def cut_into_parts(path: pathlib.Path, size: int = PART_BYTES) -> list[Part]:
  """The parts of a file, each with about `size` bytes of text.

  Raises:
    BadInputError: if the file is missing, empty, or (parquet) its footer
      cannot be read or it has no column "text" of strings.
  """
  name = str(path)
  try:
    total = path.stat().st_size
  except OSError as error:
    raise BadInputError(f"{name}: {error.strerror}") from error
  if path.suffix == ".txt":  # one document, and an empty one is a document
    return [Part(name, 0, total, 0, total)]
  if total == 0:
    raise BadInputError(f"{name}: the file is empty")
  if path.suffix == ".jsonl":
    spans = [(a, min(a + size, total)) for a in range(0, total, size)]
    return [Part(name, a, b, 0, b - a) for a, b in spans]
  if _ARRAY_RECORD in path.name:
    return _record_parts(name, total, size)
  return _parquet_parts(name, size)


def read_part(
  part: Part, skip: Callable[[Bad], None] | None = None
) -> Iterator[Text]:
  """The documents of a part, empty ones too.

  Args:
    part: from `cut_into_parts`.
    skip: is told what cannot be read, which is then left out; None raises.

  Raises:
    BadInputError: naming the file and the row group or byte.
  """
  if part.path.endswith(".parquet"):
    found = _read_parquet(part)
  elif part.path.endswith(".jsonl"):
    found = _read_json_lines(part)
  elif part.path.endswith(".txt"):
    found = _read_whole(part)
  else:
    found = _read_records(part)
  for item in found:
    if isinstance(item, Text):
      yield item
    elif skip is None:
      raise BadInputError(
        f"{item.path}: {item.where}: {item.reason}; --skip_bad_shards leaves"
        " it out"
      )
    else:
      skip(item)


def decode(raw: bytes | str) -> tuple[str, bool]:
  """Text with each run of undecodable bytes as one U+FFFD; True if any.

  Undecodable bytes of a string are its lone surrogates.
  """
  if isinstance(raw, bytes):
    try:
      return raw.decode(), False
    except UnicodeDecodeError:
      raw = raw.decode("utf-8", "surrogateescape")
  text = _SURROGATES.sub("\ufffd", raw)
  return text, text != raw


def open_parquet(path: str) -> Any:
  """A pyarrow.parquet.ParquetFile that verifies page checksums, if any."""
  try:
    import pyarrow.parquet as parquet
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      "parquet files need pyarrow: pip install 'gdn2-jax[data]'"
    ) from error
  try:
    file = parquet.ParquetFile(path, page_checksum_verification=True)
    field = file.schema_arrow.field("text")
  except KeyError as error:
    raise BadInputError(f"{path}: no column 'text'") from error
  except Exception as error:  # pyarrow has no common base class
    raise BadInputError(f"{path}: {_brief(error)}") from error
  if str(field.type) not in ("string", "large_string", "binary"):
    raise BadInputError(f"{path}: column 'text' holds {field.type}, not text")
  return file


def _parquet_parts(path: str, size: int) -> list[Part]:
  with open_parquet(path) as file:
    metadata = file.metadata
    # Leaves are numbered through nested columns: the name says which it is.
    names = [
      metadata.schema.column(i).path for i in range(metadata.num_columns)
    ]
    text = names.index("text")
    parts, first, row, rows, used = [], 0, 0, 0, 0
    for index in range(metadata.num_row_groups):
      group = metadata.row_group(index)
      used += group.column(text).total_uncompressed_size
      rows += group.num_rows
      if used >= size or index + 1 == metadata.num_row_groups:
        parts.append(Part(path, first, index + 1, row, used))
        first, row, rows, used = index + 1, row + rows, 0, 0
  return parts


def _read_parquet(part: Part) -> Iterator[Text | Bad]:
  try:
    file = open_parquet(part.path)
  except BadInputError as error:  # it could be read when it was cut
    yield _bad(part, f"row groups {part.first}..", error, 0)
    return
  with file:
    row = part.row
    for index in range(part.first, part.stop):
      count = file.metadata.row_group(index).num_rows
      try:
        column = file.read_row_group(index, columns=["text"]).column("text")
        # As bytes: a strict conversion would refuse the whole group.
        texts = column.cast("large_binary").to_pylist()
        if len(texts) != count:
          raise ValueError(f"{len(texts)} rows of {count}")
      except Exception as error:  # pyarrow has no common base class
        yield _bad(part, f"row group {index}", error, count)
      else:
        for place, raw in enumerate(texts, start=row):
          yield Text(place, *decode(raw or b""))
      row += count


def _open_records(path: str) -> Any:
  """Random access to the raw records of an ArrayRecord file."""
  from array_record.python.array_record_data_source import ArrayRecordDataSource

  return ArrayRecordDataSource([path])


def _record_parts(path: str, total: int, size: int) -> list[Part]:
  try:
    count = len(_open_records(path))
  except Exception as error:  # array_record has no common base class
    raise BadInputError(f"{path}: {_brief(error)}") from error
  step = max(1, count * size // total)
  spans = [(a, min(a + step, count)) for a in range(0, count, step)]
  return [Part(path, a, b, a, total * (b - a) // count) for a, b in spans]


def _read_records(part: Part) -> Iterator[Text | Bad]:
  import tensorflow_datasets as tfds

  folder = pathlib.Path(part.path).parent  # holds features.json
  try:
    features = tfds.features.FeatureConnector.from_config(folder)
    records = _open_records(part.path)
  except Exception as error:  # of several libraries
    yield _bad(part, f"records {part.first}..", error, part.stop - part.first)
    return
  for place in range(part.first, part.stop):
    try:
      record = features.deserialize_example_np(records[place])
      text = decode(record["text"])
    except Exception as error:  # of several libraries
      yield _bad(part, f"record {place}", error, 1)
    else:
      yield Text(place, *text)


def _read_json_lines(part: Part) -> Iterator[Text | Bad]:
  with open(part.path, "rb") as file:
    # A line belongs to the part in which it begins.
    if part.first:
      file.seek(part.first - 1)
      file.readline()
    while (place := file.tell()) < part.stop:
      line = file.readline()
      if not line.strip():
        continue
      try:
        entry = json.loads(line.decode("utf-8", "surrogateescape"))
        if not isinstance(entry, dict) or not isinstance(
          entry.get("text"), str
        ):
          raise ValueError('expected an object with a "text" string')
      except ValueError as error:
        yield _bad(part, f"the line at byte {place}", error, 1)
      else:
        yield Text(place, *decode(entry["text"]))


def _read_whole(part: Part) -> Iterator[Text | Bad]:
  try:
    raw = pathlib.Path(part.path).read_bytes()
  except OSError as error:
    yield _bad(part, "the file", error, 1)
  else:
    yield Text(0, *decode(raw))


def _bad(part: Part, where: str, error: Exception, documents: int) -> Bad:
  return Bad(part.path, where, _brief(error), documents)


def _brief(error: Exception) -> str:
  text = " ".join(str(error).split())
  return text[:200] or type(error).__name__
