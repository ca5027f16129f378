"""Builds: content, independence of workers, refusals."""

import pytest

from gdn2_jax import files
from gdn2_jax.data.build import recipe, shard
from gdn2_jax.data.packed import folder as packed
from gdn2_jax.data.text import readers
from gdn2_jax.data.text.corpus import is_held_out
from gdn2_jax.data.text.readers import find_files
from tests.data import parquet_files
from tests.data.build.small import HELD_OUT, SOURCE, build_small, content
from tests.data.packing import documents as _documents


def test_rows_hold_every_document_once_in_a_drawn_order(folder, tmp_path):
  path, texts = folder
  paths = find_files(path)
  built = build_small(paths, tmp_path / "rows")
  found = packed.open_packed(tmp_path / "rows")
  train = [t for name in sorted(texts)[:2] for t in texts[name]]
  for split, expected in (("train", train), ("validation", texts[HELD_OUT])):
    documents = _documents(found, split)
    assert sorted(documents) == sorted(expected)
    assert documents != expected
    entry = found.manifest["splits"][split]
    size = sum(len(text.encode()) for text in expected)
    assert entry["documents"] == len(expected)
    assert entry["bytes"] == size
    assert entry["tokens"] == size + len(expected)
    assert entry["predicted_bytes"] == size - len(expected)
  # Whole row groups of 20 documents, 45 kB a file.
  shards = [
    found.manifest["splits"][split]["shards"] for split in packed.SPLITS
  ]
  assert shards == [6, 3]
  # The order within a shard is drawn from places, and shards keep theirs.
  places = [
    (number, row)
    for number, name in enumerate(sorted(texts)[:2])
    for row in range(len(texts[name]))
  ]
  expected = []
  for start in range(0, len(places), 20):
    expected += sorted(
      places[start : start + 20],
      key=lambda place: shard.document_key(3, f"{place[0]}:{place[1]}"),
    )
  assert _documents(found, "train") == [
    texts[sorted(texts)[number]][row] for number, row in expected
  ]
  manifest = found.manifest
  assert [entry["split"] for entry in manifest["inputs"]] == [
    "train",
    "train",
    "validation",
  ]
  for entry in manifest["inputs"]:
    assert entry["sha256"] == files.sha256_file(path / entry["name"])
  assert manifest["source"] == SOURCE
  assert manifest["bos_policy"] == "none"
  assert "one EOS after every document" in manifest["eos_policy"]
  assert built.rates.documents == len(train) + len(texts[HELD_OUT])


def test_workers_change_nothing_and_seeds_do(folder, tmp_path):
  paths = find_files(folder[0])
  alone = build_small(paths, tmp_path / "alone")
  build_small(paths, tmp_path / "two", workers=2)
  assert content(tmp_path / "alone") == content(tmp_path / "two")
  other = build_small(paths, tmp_path / "other", options={"seed": 4})
  assert other.packed.file_hashes() != alone.packed.file_hashes()
  assert sorted(_documents(other.packed, "train")) == sorted(
    _documents(alone.packed, "train")
  )
  again = build_small(paths, tmp_path / "alone")
  assert again.rates is None  # nothing was left to do
  with pytest.raises(ValueError, match=r"alone: already holds.* in seed"):
    build_small(paths, tmp_path / "alone", options={"seed": 4})
  assert not (tmp_path / "alone.partial").exists()
  more = dict(paths) | {"more.jsonl": tmp_path / "more.jsonl"}
  (tmp_path / "more.jsonl").write_text('{"text": "more"}\n')
  with pytest.raises(ValueError, match=r"alone: .* in inputs"):
    build_small(more, tmp_path / "alone")


def test_neighbours_share_a_shard_up_to_its_size():
  sizes = {"a": [5, 5], "b": [5], "c": [30, 1], "d": [], "e": [1, 1]}
  parts = {
    name: [readers.Part(name, i, i + 1, 0, size) for i, size in enumerate(own)]
    for name, own in sizes.items()
  }
  splits = dict.fromkeys("abce", "train") | {"d": "validation"}
  tasks = recipe._tasks(parts, 10, splits)
  assert [(task.split, task.index) for task in tasks] == [
    ("train", number) for number in range(5)
  ]
  assert [[(n, p.size) for n, p in task.parts] for task in tasks] == [
    [(0, 5), (0, 5)],
    [(1, 5)],
    [(2, 30)],
    [(2, 1)],
    [(4, 1), (4, 1)],  # not with those before the file that is held out
  ]
  assert [task.size for task in tasks] == [10, 5, 30, 1, 2]


def test_odd_documents_are_counted(tmp_path):
  long = "many words of text " * 60_000
  texts = ["plain", "", None, b"a\xff\xfeb", "nul\0here", long, ""]
  parquet_files.write(tmp_path / "in" / "a.parquet", texts)
  paths = find_files(tmp_path / "in")
  options = {"validation_files": (), "validation_fraction": 0.0}
  built = build_small(paths, tmp_path / "rows", options=options)
  entry = built.packed.manifest["splits"]["train"]
  counts = {name: entry[name] for name in packed.COUNTS[:5]}
  assert counts == {
    "documents": 4,
    "empty_documents": 3,
    "invalid_utf8_documents": 1,
    "nul_documents": 1,
    "long_documents": 1,
  }
  documents = _documents(built.packed, "train")
  assert sorted(documents) == sorted(["plain", "a\ufffdb", "nul\0here", long])


def test_a_fraction_is_held_out_by_text(folder, tmp_path):
  path, texts = folder
  options = {"validation_files": (), "validation_fraction": 0.3}
  built = build_small(find_files(path), tmp_path / "rows", options=options)
  expected = {
    text
    for documents in texts.values()
    for text in documents
    if is_held_out(files.sha256_bytes(text.encode()), 0.3)
  }
  assert set(_documents(built.packed, "validation")) == expected
  assert 0.15 * 180 < len(expected) < 0.45 * 180
  assert built.packed.manifest["validation"] == {"fraction": 0.3}


def test_bad_files_stop_the_build_or_are_left_out(folder, tmp_path):
  _, texts = folder
  where = tmp_path / "in"
  parquet_files.write_folder(where)
  paths = find_files(where)
  whole = (where / "000_00000.parquet").read_bytes()
  (where / "000_00000.parquet").write_bytes(whole[: len(whole) // 2])
  second = where / "001_00000.parquet"
  damaged = bytearray(second.read_bytes())
  damaged[400] ^= 0x55
  second.write_bytes(damaged)
  with pytest.raises(ValueError, match=r"000_00000.parquet: .*skip_bad_shards"):
    build_small(paths, tmp_path / "rows")
  said = []
  built = build_small(
    paths, tmp_path / "rows", options={"skip_bad": True}, say=said.append
  )
  manifest = built.packed.manifest
  assert [e["path"] for e in manifest["skipped"]] == ["000_00000.parquet"]
  (bad,) = manifest["bad_parts"]
  assert (bad["path"], bad["documents"]) == ("001_00000.parquet", 20)
  assert sorted(_documents(built.packed, "train")) == sorted(
    texts["001_00000.parquet"][20:]
  )
  assert len(said) == 2 and all("left out" in line for line in said)
  assert "row group 0" in said[1]


def test_checksums_are_compared(folder, tmp_path):
  paths = find_files(folder[0])
  right = {name: files.sha256_file(path) for name, path in paths.items()}
  wrong = right | {"001_00000.parquet": "0" * 64}
  with pytest.raises(
    ValueError, match=r"001_00000.parquet: sha256 .* expected"
  ):
    build_small(paths, tmp_path / "rows", checksums=wrong)
  build_small(paths, tmp_path / "rows", checksums=right)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"validation_files": ("9*",)}, "validation_files='9*': none of the 3"),
    ({"validation_files": ("*",)}, "nothing is left to train on"),
    ({"validation_fraction": 1.0}, "validation_fraction=1.0"),
    ({"shard_tokens": 0}, "shard_tokens=0"),
    ({"seed": -1}, "seed=-1"),
    ({"tokenizer": "bpe-3"}, "tokenizer='bpe-3'"),
  ],
)
def test_bad_options_are_named_and_leave_nothing(
  folder, tmp_path, options, message
):
  with pytest.raises(ValueError) as refused:
    build_small(find_files(folder[0]), tmp_path / "rows", options=options)
  assert message in str(refused.value)
  assert list(tmp_path.iterdir()) == []


def test_nothing_to_train_on_is_refused(tmp_path):
  (tmp_path / "a.txt").touch()
  options = {"validation_files": (), "validation_fraction": 0.0}
  with pytest.raises(ValueError, match="no training text in 1 files"):
    build_small(find_files(tmp_path), tmp_path / "rows", options=options)
