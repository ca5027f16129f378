"""Sources of text that a run packs into its cache on first use."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import pytest

from gdn2_jax.data import pipeline
from gdn2_jax.data.build import build
from gdn2_jax.data.pipeline import DataConfig
from gdn2_jax.data.text import readers
from tests.data import parquet_files
from tests.data.packing import documents, write_lines

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path):
  texts = ["", *parquet_files.texts()[:40], ""]
  write_lines(tmp_path / "text" / "a.jsonl", texts)
  (tmp_path / "text" / "b.txt").write_text("the last one")
  return DataConfig(
    source=f"text:{tmp_path / 'text'}",
    tokenizer="bytes",
    seq_len=48,
    batch_size=4,
    cache_dir=str(tmp_path / "cache"),
  )


def test_text_is_packed_on_first_use(config, monkeypatch):
  dataset = pipeline.open_dataset(config)
  found = documents(dataset.packed, "train")
  found += documents(dataset.packed, "validation")
  assert sorted(found) == sorted([*parquet_files.texts()[:40], "the last one"])
  with monkeypatch.context() as patch:
    patch.setattr(build, "build_rows", None)  # nothing is packed again
    again = pipeline.open_dataset(config)
  assert again.fingerprint == dataset.fingerprint
  write_lines(pathlib.Path(config.source[5:]) / "c.jsonl", ["more"] * 9)
  assert pipeline.open_dataset(config).fingerprint != dataset.fingerprint
  trained = dataclasses.replace(config, tokenizer="bpe-300")
  assert pipeline.open_dataset(trained).tokenizer.vocab_size == 300


def test_text_can_be_mixed(config):
  config.source = f"{config.source}:0.5,snapshot:0.5"
  dataset = pipeline.open_dataset(config)
  batches = dataset.train_batches(start_step=3)
  assert next(batches)["inputs"].shape == (4, 48)
  batches.close()
  kinds = [part.manifest["source"]["kind"] for part in dataset.parts]
  assert kinds == ["text", "snapshot"]
  # Each source trains its own tokenizer of this name.
  config.tokenizer = "bpe-300"
  with pytest.raises(ValueError, match=r"'snapshot' was packed with another"):
    pipeline.open_dataset(config)


def test_text_that_cannot_be_read_is_named(config):
  path = pathlib.Path(config.source[5:]) / "a.jsonl"
  write_lines(path, [""])
  (path.parent / "b.txt").unlink()
  with pytest.raises(ValueError, match="no training text in 1 files"):
    pipeline.open_dataset(config)
  path.write_text("nonsense\n")
  with pytest.raises(readers.BadInputError, match=r"a\.jsonl: the line at"):
    pipeline.open_dataset(config)


_OPEN = """
import sys
from gdn2_jax.data.build import build
from gdn2_jax.data.pipeline import DataConfig, open_dataset
made = []
run = build._run
build._run = lambda *arguments: made.append(1) or run(*arguments)
config = DataConfig(source="snapshot", tokenizer="bpe-300", cache_dir={cache!r})
print(open_dataset(config).fingerprint, len(made))
"""


def test_processes_that_start_together_pack_once(tmp_path):
  program = _OPEN.format(cache=str(tmp_path))
  running = [
    subprocess.Popen(
      [sys.executable, "-c", program],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      cwd=ROOT,
      env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
    )
    for _ in range(3)
  ]
  printed = []
  for process in running:
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    printed.append(out.decode().split())
  assert len({fingerprint for fingerprint, _ in printed}) == 1
  assert sum(int(made) for _, made in printed) == 1
  (folder,) = (tmp_path / "packed").iterdir()
  assert sorted(p.name for p in folder.iterdir()) == [
    "manifest.json",
    "tokenizer.json",
    "train-00000.offsets.bin",
    "train-00000.tokens.bin",
    "validation-00000.offsets.bin",
    "validation-00000.tokens.bin",
  ]
