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
from collections.abc import Callable, Iterable, Iterator
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
  """One document: where it stands in its file, and what it says."""

  place: int
  text: str
  is_invalid_utf8: bool


@dataclasses.dataclass(frozen=True)
class Bad:
  """A place that was left out, and the reason."""

  path: str
  where: str
  reason: str
  documents: int


Skip = Callable[[Bad], None]


def find_files(source: str | pathlib.Path) -> list[pathlib.Path]:
  """The readable files of a folder and the folders in it, or the file itself.

  Returns:
    Paths sorted by name, relative to `source`.

  Raises:
    ValueError: if there is none.
  """
  path = pathlib.Path(source)
  if path.is_dir():
    found = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES)
    found = [p for p in found if p.is_file()]
  else:
    found = [path] if path.is_file() and path.suffix in SUFFIXES else []
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
    starts = range(0, total, size)
    ends = [min(start + size, total) for start in starts]
    return [
      Part(name, a, b, 0, b - a) for a, b in zip(starts, ends, strict=True)
    ]
  if _ARRAY_RECORD in path.name:
    return _record_parts(path, total, size)
  return _parquet_parts(path, size)


def read_part(part: Part, skip: Skip | None = None) -> Iterator[Text]:
  """The documents of a part, empty ones too.

  Args:
    part: from `cut_into_parts`.
    skip: is told what cannot be read, which is then left out; None raises.

  Raises:
    BadInputError: naming the file and the row group or byte.
  """
  path = pathlib.Path(part.path)
  if path.suffix == ".parquet":
    return _read_parquet(part, skip)
  if path.suffix == ".jsonl":
    return _read_json_lines(part, skip)
  if _ARRAY_RECORD in path.name:
    return _read_records(part, skip)
  return _read_whole(part, skip)


def group_parts(parts: Iterable[Part], size: int) -> list[list[Part]]:
  """Neighbouring parts joined up to about `size` bytes: fewer, even tasks."""
  groups: list[list[Part]] = []
  room = 0
  for part in parts:
    if not groups or part.size > room:
      groups.append([])
      room = size
    groups[-1].append(part)
    room -= part.size
  return groups


def decode(raw: bytes | str) -> tuple[str, bool]:
  """Text without lone surrogates, and whether anything was replaced.

  Args:
    raw: bytes, or a string in which undecodable bytes are lone surrogates.

  Returns:
    The text, each run of undecodable bytes one U+FFFD; True if there was one.
  """
  if isinstance(raw, bytes):
    try:
      return raw.decode(), False
    except UnicodeDecodeError:
      raw = raw.decode("utf-8", "surrogateescape")
  text = _SURROGATES.sub("\ufffd", raw)
  return text, text != raw


def open_parquet(path: str) -> Any:
  """A pyarrow.parquet.ParquetFile that verifies page checksums, if any.

  Raises:
    BadInputError: if the footer cannot be read or "text" is missing.
    ModuleNotFoundError: without pyarrow, with the command that installs it.
  """
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


def _parquet_parts(path: pathlib.Path, size: int) -> list[Part]:
  with open_parquet(str(path)) as file:
    metadata = file.metadata
    column = file.schema_arrow.get_field_index("text")
    parts, first, row, rows, used = [], 0, 0, 0, 0
    for index in range(metadata.num_row_groups):
      group = metadata.row_group(index)
      used += _text_column(group, column).total_uncompressed_size
      rows += group.num_rows
      if used >= size or index + 1 == metadata.num_row_groups:
        parts.append(Part(str(path), first, index + 1, row, used))
        first, row, rows, used = index + 1, row + rows, 0, 0
  return parts


def _text_column(group: Any, guess: int) -> Any:
  # Leaves are numbered through nested columns: trust the name, not the place.
  if group.column(guess).path_in_schema == "text":
    return group.column(guess)
  leaves = (group.column(i) for i in range(group.num_columns))
  return next(leaf for leaf in leaves if leaf.path_in_schema == "text")


def _read_parquet(part: Part, skip: Skip | None) -> Iterator[Text]:
  try:
    file = open_parquet(part.path)
  except BadInputError as error:  # it could be read when it was cut
    _report(part.path, f"row groups {part.first}..", error, 0, skip)
    return
  with file:
    row = part.row
    for index in range(part.first, part.stop):
      count = file.metadata.row_group(index).num_rows
      try:
        texts = _row_group(file, index)
        if len(texts) != count:
          raise ValueError(f"{len(texts)} rows of {count}")
      except Exception as error:  # pyarrow has no common base class
        _report(part.path, f"row group {index}", error, count, skip)
      else:
        for place, raw in enumerate(texts, start=row):
          yield Text(place, *decode(raw or b""))
      row += count


def _row_group(file: Any, index: int) -> list[bytes | None]:
  import pyarrow

  column = file.read_row_group(index, columns=["text"]).column("text")
  # As bytes: a strict conversion would refuse the whole group.
  return column.cast(pyarrow.large_binary()).to_pylist()


def _open_records(path: str) -> Any:
  """Random access to the raw records of an ArrayRecord file."""
  from array_record.python.array_record_data_source import ArrayRecordDataSource

  return ArrayRecordDataSource([path])


def _record_parts(path: pathlib.Path, total: int, size: int) -> list[Part]:
  try:
    count = len(_open_records(str(path)))
  except Exception as error:  # array_record has no common base class
    raise BadInputError(f"{path}: {_brief(error)}") from error
  step = max(1, count * size // total)
  starts = range(0, count, step)
  spans = [(start, min(start + step, count)) for start in starts]
  return [Part(str(path), a, b, a, total * (b - a) // count) for a, b in spans]


def _read_records(part: Part, skip: Skip | None) -> Iterator[Text]:
  import tensorflow_datasets as tfds

  folder = pathlib.Path(part.path).parent  # holds features.json
  try:
    features = tfds.features.FeatureConnector.from_config(folder)
    records = _open_records(part.path)
  except Exception as error:  # of several libraries
    count = part.stop - part.first
    _report(part.path, f"records {part.first}..", error, count, skip)
    return
  for place in range(part.first, part.stop):
    try:
      record = features.deserialize_example_np(records[place])
      text = decode(record["text"])
    except Exception as error:  # of several libraries
      _report(part.path, f"record {place}", error, 1, skip)
    else:
      yield Text(place, *text)


def _read_json_lines(part: Part, skip: Skip | None) -> Iterator[Text]:
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
        yield Text(place, *decode(_text_of(line)))
      except ValueError as error:
        _report(part.path, f"the line at byte {place}", error, 1, skip)


def _text_of(line: bytes) -> str:
  entry = json.loads(line.decode("utf-8", "surrogateescape"))
  if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
    raise ValueError('expected an object with a "text" string')
  return entry["text"]


def _read_whole(part: Part, skip: Skip | None) -> Iterator[Text]:
  try:
    raw = pathlib.Path(part.path).read_bytes()
  except OSError as error:
    _report(part.path, "the file", error, 1, skip)
    return
  yield Text(0, *decode(raw))


def _report(
  path: str, where: str, error: Exception, count: int, skip: Skip | None
) -> None:
  if skip is None:
    raise BadInputError(
      f"{path}: {where}: {_brief(error)}; --skip_bad_shards leaves it out"
    ) from error
  skip(Bad(path, where, _brief(error), count))


def _brief(error: Exception) -> str:
  text = " ".join(str(error).split())
  return text[:200] or type(error).__name__
