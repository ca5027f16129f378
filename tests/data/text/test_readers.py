"""Reading text: every document once, and nothing wrong without a word."""

import json
import random

import pytest

from gdn2_jax.data.text import readers
from tests.data import parquet_files

ODD = ["plain", "", None, b"a\xff\xfeb", "nul\0here", "\u2603" * 3]
READ = ["plain", "", "", "a\ufffdb", "nul\0here", "\u2603" * 3]


def _read(path, size=readers.PART_BYTES, skip=None):
  parts = readers.cut_into_parts(path, size)
  return [item for part in parts for item in readers.read_part(part, skip)]


@pytest.mark.parametrize("size", [1, 700, 5000, 1 << 30])
def test_parquet_parts_hold_every_row_once(tmp_path, size):
  path = tmp_path / "a.parquet"
  documents = parquet_files.texts()[:50]
  parquet_files.write(path, documents, group=7)
  found = _read(path, size)
  assert [item.text for item in found] == documents
  assert [item.place for item in found] == list(range(50))
  assert len(readers.cut_into_parts(path, 1)) == 8


@pytest.mark.parametrize("size", [1, 2, 13, 100, 1 << 20])
def test_json_lines_belong_to_one_part(tmp_path, size):
  path = tmp_path / "a.jsonl"
  lines = [json.dumps({"text": text}) for text in parquet_files.texts()[:9]]
  path.write_text("\n".join([*lines[:4], "", *lines[4:]]))  # no last newline
  found = _read(path, size)
  assert [item.text for item in found] == parquet_files.texts()[:9]
  assert len({item.place for item in found}) == 9


def test_odd_documents_are_told_apart(tmp_path):
  path = tmp_path / "odd.parquet"
  parquet_files.write(path, ODD)
  found = _read(path)
  assert [item.text for item in found] == READ
  assert [item.is_invalid_utf8 for item in found] == [False] * 3 + [
    True,
    False,
    False,
  ]
  lines = tmp_path / "odd.jsonl"
  lines.write_bytes(b'{"text": "a\xff\xfeb"}\n{"text": "\\ud800"}\n')
  assert [item.text for item in _read(lines)] == ["a\ufffdb", "\ufffd"]
  whole = tmp_path / "odd.txt"
  whole.write_bytes(b"one\n\xf0two")
  (item,) = _read(whole)
  assert (item.text, item.is_invalid_utf8) == ("one\n\ufffdtwo", True)


def test_flipped_bits_are_never_silent(tmp_path):
  path = tmp_path / "a.parquet"
  documents = parquet_files.texts()[:60]
  parquet_files.write(path, documents)
  whole = path.read_bytes()
  draw = random.Random(0)
  outcomes = {"raised": 0, "harmless": 0}
  for _ in range(60):
    place, bit = draw.randrange(len(whole)), draw.randrange(8)
    damaged = bytearray(whole)
    damaged[place] ^= 1 << bit
    path.write_bytes(damaged)
    try:
      found = _read(path)
    except readers.BadInputError as error:
      assert "a.parquet" in str(error)
      outcomes["raised"] += 1
    else:
      assert [item.text for item in found] == documents, (place, bit)
      outcomes["harmless"] += 1
  assert outcomes["raised"] > 20, outcomes


def test_truncated_files_are_named(tmp_path):
  path = tmp_path / "a.parquet"
  parquet_files.write(path, parquet_files.texts()[:60])
  whole = path.read_bytes()
  for keep in (0, 3, 100, len(whole) // 2, len(whole) - 1):
    path.write_bytes(whole[:keep])
    with pytest.raises(readers.BadInputError, match=r"a\.parquet"):
      _read(path)


def test_bad_places_are_skipped_and_counted(tmp_path):
  path = tmp_path / "a.parquet"
  documents = parquet_files.texts()[:60]
  parquet_files.write(path, documents)
  with readers.open_parquet(str(path)) as file:
    chunk = file.metadata.row_group(1).column(0)
    first = chunk.dictionary_page_offset or chunk.data_page_offset
    place = first + chunk.total_compressed_size // 2
  damaged = bytearray(path.read_bytes())
  damaged[place] ^= 0xFF
  path.write_bytes(damaged)
  with pytest.raises(
    readers.BadInputError, match=r"a\.parquet: row group 1: .*--skip_bad_shards"
  ):
    _read(path)
  bad = []
  found = _read(path, skip=bad.append)
  assert [item.text for item in found] == documents[:20] + documents[40:]
  assert [item.place for item in found] == [*range(20), *range(40, 60)]
  (entry,) = bad
  assert (entry.path, entry.where) == (str(path), "row group 1")
  assert entry.documents == 20

  lines = tmp_path / "a.jsonl"
  lines.write_text('{"text": "a"}\n{"text": 1}\nnonsense\n{"text": "b"}\n')
  with pytest.raises(readers.BadInputError, match="the line at byte 14: exp"):
    _read(lines)
  bad.clear()
  assert [i.text for i in _read(lines, skip=bad.append)] == ["a", "b"]
  assert [entry.where for entry in bad] == [
    "the line at byte 14",
    "the line at byte 26",
  ]


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("missing.parquet", None, "missing.parquet: No such file"),
    ("a.parquet", b"", "a.parquet: the file is empty"),
    ("a.parquet", b"not parquet at all", "a.parquet: "),
    ("a.jsonl", b"", "a.jsonl: the file is empty"),
  ],
)
def test_unreadable_files_are_named(tmp_path, name, content, message):
  if content is not None:
    (tmp_path / name).write_bytes(content)
  with pytest.raises(readers.BadInputError, match=message):
    readers.cut_into_parts(tmp_path / name)


def test_a_text_column_is_needed(tmp_path):
  import pyarrow
  import pyarrow.parquet as parquet

  path = tmp_path / "a.parquet"
  for columns, message in (
    ({"body": ["x"]}, "no column 'text'"),
    ({"text": [1]}, "column 'text' holds int64"),
  ):
    parquet.write_table(pyarrow.table(columns), path)
    with pytest.raises(readers.BadInputError, match=message):
      readers.cut_into_parts(path)


def test_find_files(tmp_path):
  for name in ("b.txt", "x/a.jsonl", "a.parquet", "notes.md"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
  found = readers.find_files(tmp_path)
  assert list(found) == ["a.parquet", "b.txt", "x/a.jsonl"]
  assert found == {name: tmp_path / name for name in found}
  alone = readers.find_files(tmp_path / "b.txt")
  assert alone == {"b.txt": tmp_path / "b.txt"}
  for wrong in (tmp_path / "notes.md", tmp_path / "none", tmp_path / "x" / "y"):
    with pytest.raises(ValueError, match="source="):
      readers.find_files(wrong)
