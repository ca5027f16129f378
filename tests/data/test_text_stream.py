"""Text packed while training: the same rows as a slow and obvious packer."""

import dataclasses
import json

import numpy as np
import pytest

from gdn2_jax.data import pipeline, text_stream
from gdn2_jax.data.pipeline import DataConfig
from gdn2_jax.data.text import readers
from gdn2_jax.data.tokenizer.api import BytesTokenizer
from tests.data import parquet_files
from tests.data.batches import assert_equal

LENGTH = 48
BATCH = 4


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  path = tmp_path_factory.mktemp("text")
  texts = ["", *parquet_files.texts()[:40], ""]
  lines = [json.dumps({"text": text}) for text in texts]
  (path / "a.jsonl").write_text("\n".join(lines))
  (path / "b.txt").write_text("the last one")
  return DataConfig(
    source=f"text:{path}",
    tokenizer="bytes",
    seq_len=LENGTH,
    batch_size=BATCH,
    seed=2,
  )


@pytest.fixture(scope="module")
def dataset(config):
  return pipeline.open_dataset(config)


def _take(dataset, count, *place):
  batches = dataset.train_batches(*place)
  taken = [next(batches) for _ in range(count)]
  assert batches.step == (place[0] if place else 0) + count
  batches.close()
  return taken


def test_lanes_hold_whole_documents_end_to_end(dataset):
  batches = _take(dataset, 60)
  known = {
    dataset.texts[i] for i in range(len(dataset.texts)) if dataset.texts[i]
  }
  read = []
  for lane in range(BATCH):
    inputs_ = np.concatenate([batch["inputs"][lane] for batch in batches])
    targets = np.concatenate([batch["targets"][lane] for batch in batches])
    np.testing.assert_array_equal(inputs_[1:], targets[:-1])
    mask = np.concatenate([batch["loss_mask"][lane] for batch in batches])
    np.testing.assert_array_equal(mask == 0, inputs_ == 256)
    ends = np.flatnonzero(inputs_ == 256) + 1
    pieces = [
      bytes(p[:-1].tolist()).decode() for p in np.split(inputs_, ends)[:-1]
    ]
    assert set(pieces) <= known
    read += pieces
  assert len(read) > 10
  for batch in batches:
    starts = np.zeros_like(batch["inputs"], bool)
    starts[:, 0] = True
    starts[:, 1:] = batch["inputs"][:, :-1] == 256
    np.testing.assert_array_equal(batch["positions"] == 0, starts)
    np.testing.assert_array_equal(
      batch["segment_ids"], np.cumsum(starts, axis=1)
    )
    pipeline.check_batch(batch, 259)


def test_an_epoch_holds_every_document(dataset):
  count = len(dataset.texts)
  order = text_stream.TextBatches(
    dataset.texts, BytesTokenizer(), seed=2, seq_len=8, batch_size=1
  )._order
  first = [order[i] for i in range(count)]
  assert sorted(first) == list(range(count))
  assert first != [order[count + i] for i in range(count)]


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_lanes(dataset, hosts):
  parts = [_take(dataset, 5, 2, host, hosts) for host in range(hosts)]
  joined = [
    {name: np.concatenate([part[name] for part in step]) for name in step[0]}
    for step in zip(*parts, strict=True)
  ]
  assert_equal(joined, _take(dataset, 7)[2:])


def test_a_resume_gives_the_same_rows(dataset):
  straight = _take(dataset, 12)
  assert_equal(_take(dataset, 5, 7), straight[7:])
  batches = dataset.train_batches(3)
  next(batches)
  batches.seek(1)  # also backwards
  assert_equal([next(batches)], straight[1:2])
  batches.close()


def test_identity_and_manifest(config, dataset, tmp_path):
  assert pipeline.open_dataset(config).fingerprint == dataset.fingerprint
  other = dataclasses.replace(config, seed=3)
  assert pipeline.open_dataset(other).fingerprint != dataset.fingerprint
  (tmp_path / "a.jsonl").write_text(
    "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(40))
  )
  changed = dataclasses.replace(config, source=f"text:{tmp_path}")
  assert pipeline.open_dataset(changed).fingerprint != dataset.fingerprint
  assert dataset.manifest["format"] == "gdn2-text-stream"
  entry = dataset.manifest["splits"]["validation"]
  assert entry["tokens"] == len(dataset.validation_tokens())
  assert dataset.validation_bytes_per_token == pytest.approx(1.0, abs=0.01)


def test_a_trained_tokenizer(config):
  trained = dataclasses.replace(config, tokenizer="bpe-300")
  dataset = pipeline.open_dataset(trained)
  assert dataset.tokenizer.vocab_size == 300
  (batch,) = _take(dataset, 1)
  assert batch["inputs"].max() > 256


def test_what_cannot_be(config, tmp_path):
  with pytest.raises(ValueError, match=r"num_workers=2: .* expected 0"):
    pipeline.open_dataset(dataclasses.replace(config, num_workers=2))
  (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
  empty = dataclasses.replace(config, source=f"text:{tmp_path}")
  with pytest.raises(ValueError, match="no train documents"):
    pipeline.open_dataset(empty)
  (tmp_path / "a.jsonl").write_text("nonsense\n")
  with pytest.raises(readers.BadInputError, match=r"a\.jsonl: the line at"):
    pipeline.open_dataset(empty)


def test_errors_of_the_reader_arrive(dataset):
  class Broken:
    def __len__(self):
      return 10

    def __getitem__(self, index):
      raise RuntimeError("hash mismatch")

  batches = text_stream.TextBatches(
    text_stream.Texts(Broken(), "tfds:x"),
    BytesTokenizer(),
    seed=0,
    seq_len=8,
    batch_size=1,
  )
  with pytest.raises(ValueError, match=r"tfds:x: record \d: hash mismatch"):
    next(batches)
  batches.close()
