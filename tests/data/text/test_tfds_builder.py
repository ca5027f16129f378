"""The TFDS dataset: ten columns, random access, no TensorFlow."""

import json
import pathlib
import random
import shutil
import sys

import pytest

from gdn2_jax import files
from gdn2_jax.data import __main__
from gdn2_jax.data.pipeline import DataConfig, open_dataset
from gdn2_jax.data.text import fineweb_edu, readers, tfds_builder
from tests.data import parquet_files
from tests.data.packing import documents

EACH = 30


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  root = tmp_path_factory.mktemp("tfds")
  texts = parquet_files.write_folder(root / "parquet", files=3, each=EACH)
  paths = fineweb_edu.local_files(root / "parquet")
  builder = tfds_builder.prepare(paths, root / "data")
  return root, texts, builder


def test_random_access_to_the_ten_columns(prepared):
  _, texts, builder = prepared
  train = builder.as_data_source(split="train")
  validation = builder.as_data_source(split="validation")
  assert (len(train), len(validation)) == (2 * EACH, EACH)
  names = sorted(texts)
  expected = texts[names[0]] + texts[names[1]]
  for index in (0, 7, EACH, 2 * EACH - 1, 3):
    record = train[index]
    row = index % EACH
    assert record["text"].decode() == expected[index]
    assert record["id"] == f"<urn:uuid:{row:08d}>".encode()
    assert record["dump"] == b"CC-MAIN-2024-10"
    assert record["url"] == f"https://example.org/{row}".encode()
    assert record["language"] == b"en"
    assert record["language_score"] == 0.5 + row / 1024  # exact in float32
    assert (record["token_count"], record["int_score"]) == (row, 3)
    assert record["score"] == 3.25
    assert set(record) == {name for name, _ in fineweb_edu.COLUMNS}
  assert validation[EACH - 1]["text"].decode() == texts[names[2]][-1]


def test_it_is_prepared_once_and_says_from_what(prepared):
  root, texts, _ = prepared
  folder = root / "data" / "fine_web_edu" / "local" / "1.4.0"
  written = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
  assert any(name.endswith("array_record-00000-of-00001") for name in written)
  again = tfds_builder.prepare({}, root / "data")  # without the files
  assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == written
  assert again.info.splits["train"].num_examples == 2 * EACH
  metadata = json.loads((folder / "metadata.json").read_text())
  assert metadata["inputs"] == {
    name: files.sha256_file(root / "parquet" / name) for name in texts
  }


def test_tensorflow_is_not_needed(prepared):
  _, _, builder = prepared
  assert builder.as_data_source(split="train")[0]["text"]
  assert "tensorflow" not in sys.modules


def test_the_command_line(prepared, tmp_path, capsys):
  root, *_ = prepared
  argv = ["tfds", f"--local={root / 'parquet'}", f"--out={root / 'data'}"]
  assert __main__.main(argv) == 0
  assert "fine_web_edu" in capsys.readouterr().out
  assert __main__.main(["tfds", "default", *argv[1:]]) == 2
  assert "config='default': expected one of" in capsys.readouterr().err
  parquet_files.write(tmp_path / "one.parquet", ["a"])
  argv = ["tfds", f"--local={tmp_path}", f"--out={tmp_path / 'data'}"]
  assert __main__.main(argv) == 2
  assert "one of them is held out" in " ".join(capsys.readouterr().err.split())


def test_records_are_read_in_parts(prepared):
  _, texts, builder = prepared
  (path,) = pathlib.Path(builder.data_dir).glob("*-train.array_record*")
  names = sorted(texts)
  for size in (1, 20_000, 1 << 30):
    parts = readers.cut_into_parts(path, size)
    items = [item for part in parts for item in readers.read_part(part)]
    assert [item.text for item in items] == texts[names[0]] + texts[names[1]]
    assert [item.place for item in items] == list(range(2 * EACH))
  assert len(readers.cut_into_parts(path, 1)) == 2 * EACH


def test_flipped_bits_are_never_silent(prepared, tmp_path):
  _, texts, builder = prepared
  shutil.copytree(builder.data_dir, tmp_path / "1.4.0")
  (path,) = (tmp_path / "1.4.0").glob("*-train.array_record*")
  whole = path.read_bytes()
  names = sorted(texts)
  expected = texts[names[0]] + texts[names[1]]
  draw = random.Random(1)
  raised = 0
  for _ in range(30):
    damaged = bytearray(whole)
    damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
    path.write_bytes(damaged)
    try:
      (part,) = readers.cut_into_parts(path)
      found = [item.text for item in readers.read_part(part)]
    except readers.BadInputError as error:
      assert path.name in str(error)
      raised += 1
    else:
      assert found == expected
  assert raised > 5


def test_a_source_of_the_pipeline(prepared, tmp_path):
  root, texts, builder = prepared
  config = DataConfig(
    source=f"tfds:{builder.data_dir}",
    tokenizer="bytes",
    seq_len=64,
    batch_size=4,
    cache_dir=str(tmp_path),
  )
  dataset = open_dataset(config)
  batches = dataset.train_batches()
  assert next(batches)["inputs"].shape == (4, 64)
  batches.close()
  names = sorted(texts)
  expected = {
    "train": texts[names[0]] + texts[names[1]],
    "validation": texts[names[2]],
  }
  for split, documents_ in expected.items():
    assert sorted(documents(dataset.packed, split)) == sorted(documents_)
  for place in ("nothing", "parquet"):
    config.source = f"tfds:{root / place}"
    with pytest.raises(ValueError, match=rf"tfds:.*{place}|{place} does not"):
      open_dataset(config)
