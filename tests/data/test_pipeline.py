"""The pipeline: one order for any number of hosts, exact seeking, identity."""

import dataclasses
import math
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest

from gdn2_jax.data import __main__, pipeline
from gdn2_jax.data.build import build
from gdn2_jax.data.packed.rows import PackedRows
from gdn2_jax.data.pipeline import DataConfig, TrainBatches, check_batch
from gdn2_jax.data.text import corpus
from tests.data.batches import assert_equal
from tests.data.packing import borders, documents

LENGTH = 64
BATCH = 4


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def config(cache):
  return DataConfig(
    source="snapshot",
    tokenizer="bpe-300",
    seq_len=LENGTH,
    batch_size=BATCH,
    seed=3,
    cache_dir=str(cache),
  )


@pytest.fixture(scope="module")
def dataset(config):
  return pipeline.open_dataset(config)


def _take(batches, count):
  taken = [next(batches) for _ in range(count)]
  batches.close()
  return taken


def _with(dataset, **changes):
  return pipeline.open_dataset(dataclasses.replace(dataset.config, **changes))


def test_batches_have_the_promised_arrays(dataset):
  (batch,) = _take(dataset.train_batches(), 1)
  assert sorted(batch) == [
    "inputs",
    "loss_mask",
    "positions",
    "segment_ids",
    "targets",
  ]
  check_batch(batch, dataset.tokenizer.vocab_size)
  assert {values.shape for values in batch.values()} == {(BATCH, LENGTH)}
  np.testing.assert_array_equal(
    batch["inputs"][:, 1:], batch["targets"][:, :-1]
  )


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_global_batches_do_not_depend_on_hosts_or_threads(
  dataset, hosts, threads
):
  expected = _take(dataset.train_batches(start_step=5), 12)
  run = _with(dataset, num_threads=threads)
  parts = [
    _take(run.train_batches(5, process_index=h, process_count=hosts), 12)
    for h in range(hosts)
  ]
  for part in parts:
    assert part[0]["inputs"].shape == (BATCH // hosts, LENGTH)
  joined = [
    {name: np.concatenate([p[name] for p in step]) for name in step[0]}
    for step in zip(*parts, strict=True)
  ]
  assert_equal(joined, expected)


@pytest.mark.parametrize("step", [0, 1, 7, 19])
def test_resuming_at_a_step_equals_running_through(dataset, step):
  straight = _take(dataset.train_batches(), 24)
  batches = dataset.train_batches(start_step=step)
  assert batches.step == step
  assert_equal([next(batches) for _ in range(24 - step)], straight[step:])
  assert batches.step == 24
  batches.seek(step)  # also after prefetching has gone past it
  assert_equal(_take(batches, 24 - step), straight[step:])


class _CountedRows(PackedRows):
  """Counts the rows that are read."""

  def __getitem__(self, index):
    reads.append(index)
    return super().__getitem__(index)


reads: list[int] = []


def test_seeking_reads_no_row_on_the_way(dataset):
  rows = dataset.train_rows()
  counted = _CountedRows(rows.tokens, rows.offsets, rows.seq_len)
  reads.clear()
  batches = TrainBatches(
    [counted], [1.0], seed=3, batch_size=BATCH, start_step=2_000_000
  )
  next(batches)
  assert len(reads) == BATCH
  batches.close()


def _epochs(dataset, seed, count):
  """The row indices of the first epochs, as tuples."""
  rows = dataset.train_rows()
  counted = _CountedRows(rows.tokens, rows.offsets, 8 * rows.seq_len)
  reads.clear()
  batches = TrainBatches([counted], [1.0], seed=seed, batch_size=BATCH)
  while len(reads) < count * len(counted):
    next(batches)
  batches.close()
  size = len(counted)
  return [tuple(reads[i * size : (i + 1) * size]) for i in range(count)]


def test_every_epoch_is_another_permutation_of_all_rows(dataset):
  epochs = _epochs(dataset, 3, 3)
  identity = tuple(range(len(epochs[0])))
  assert len(identity) > 100
  for epoch in epochs:
    assert tuple(sorted(epoch)) == identity
  assert len({*epochs, identity}) == 4


def test_a_seed_is_not_the_next_seed_an_epoch_later(dataset):
  assert len({*_epochs(dataset, 3, 3), *_epochs(dataset, 4, 3)}) == 6


@pytest.mark.parametrize("length", [3, 64, 1000, 10**6])
def test_every_validation_token_counts_once(dataset, length):
  batch_size = 512 if length < 64 else 3
  tokens = dataset.validation_tokens()
  first = borders(dataset.packed.offsets["validation"])
  counted = np.zeros(dataset.tokenizer.vocab_size, np.int64)
  shapes = set()
  for batch in dataset.validation_batches(length, batch_size):
    shapes.add(batch["inputs"].shape)
    targets = batch["targets"][batch["loss_mask"] == 1]
    counted += np.bincount(targets, minlength=len(counted))
  assert shapes == {(batch_size, length)}
  expected = np.bincount(np.delete(tokens, first[:-1]), minlength=len(counted))
  np.testing.assert_array_equal(counted, expected)


def test_validation_is_fixed_and_can_be_limited(dataset):
  once = list(dataset.validation_batches(LENGTH, 5))
  assert_equal(list(dataset.validation_batches(LENGTH, 5)), once)
  assert_equal(list(dataset.validation_batches(LENGTH, 5, limit=2)), once[:2])
  assert_equal(list(_with(dataset, seed=9).validation_batches(LENGTH, 5)), once)
  inputs = np.concatenate([b["inputs"] for b in once]).reshape(-1)
  tokens = dataset.validation_tokens()
  np.testing.assert_array_equal(inputs[: len(tokens) - 1], tokens[:-1])
  segments = np.concatenate([b["segment_ids"] for b in once]).reshape(-1)
  assert not segments[len(tokens) - 1 :].any()
  assert segments[: len(tokens) - 1].all()


def test_bits_per_byte_are_exact(dataset):
  # A model that gives every byte of a token 8 bits must score 8 bits/byte.
  tokenizer = dataset.tokenizer
  size = np.array(
    [len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)]
  )
  nats, count = 0.0, 0.0
  for batch in dataset.validation_batches(LENGTH, BATCH):
    nll = size[batch["targets"]] * 8 * math.log(2)
    nats += (nll * batch["loss_mask"]).sum()
    count += batch["loss_mask"].sum()
  bits = nats / count / math.log(2) / dataset.validation_bytes_per_token
  assert bits == pytest.approx(8, rel=1e-12)


def test_held_out_documents_are_the_validation_split(dataset):
  _, held_out = corpus.split_documents(corpus.read_corpus("snapshot").documents)
  texts = set(documents(dataset.packed, "validation"))
  assert texts == {document.text for document in held_out}


def test_fingerprint_covers_what_decides_the_batches(dataset, cache, tmp_path):
  assert dataset.fingerprint == _with(dataset).fingerprint
  same = {"num_threads": 7, "cache_dir": str(tmp_path), "verify_hashes": False}
  assert dataset.fingerprint == _with(dataset, **same).fingerprint
  changes = [
    {"seq_len": 65},
    {"seed": 4},
    {"batch_size": 8},
    {"tokenizer": "bpe-301"},
    {"tokenizer": "bytes"},
  ]
  prints = {_with(dataset, **change).fingerprint for change in changes}
  assert len(prints | {dataset.fingerprint}) == len(changes) + 1
  assert re.fullmatch("[0-9a-f]{64}", dataset.fingerprint)


def test_the_cache_is_used(dataset, monkeypatch):
  monkeypatch.setattr(build, "build_rows", None)
  assert _with(dataset).fingerprint == dataset.fingerprint


def test_a_packed_folder_is_a_source(dataset, tmp_path):
  folder = tmp_path / "packed"
  argv = ["snapshot", f"--out={folder}", "--tokenizer=bpe-300"]
  assert __main__.main(argv) == 0
  again = _with(dataset, source=str(folder))
  assert again.fingerprint == dataset.fingerprint
  assert_equal(
    _take(again.train_batches(2), 3), _take(dataset.train_batches(2), 3)
  )
  by_file = _with(
    dataset, source=str(folder), tokenizer=str(folder / "tokenizer.json")
  )
  assert by_file.fingerprint == dataset.fingerprint
  other = tmp_path / "other.json"
  _with(dataset, tokenizer="bytes").tokenizer.save(other)
  for wrong in ("bytes", "bpe-301", str(other)):
    with pytest.raises(ValueError, match=f"data.tokenizer='{wrong}'"):
      _with(dataset, source=str(folder), tokenizer=wrong)
  (folder / "train-00000.tokens.bin").write_bytes(b"")
  with pytest.raises(ValueError, match=r"train-00000\.tokens\.bin: 0 bytes"):
    _with(dataset, source=str(folder))


def test_a_tokenizer_file_is_accepted(dataset, tmp_path):
  path = tmp_path / "tokenizer.json"
  dataset.tokenizer.save(path)
  again = _with(dataset, tokenizer=str(path))
  assert again.fingerprint == dataset.fingerprint
  assert again.packed.manifest["tokenizer"]["spec"] == str(path)


def test_a_dataset_is_picklable(dataset):
  copy = pickle.loads(pickle.dumps(dataset))
  assert copy.fingerprint == dataset.fingerprint
  assert_equal(
    list(copy.validation_batches(LENGTH, 8)),
    list(dataset.validation_batches(LENGTH, 8)),
  )


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"seq_len": 0}, "data.seq_len=0: expected at least 1"),
    ({"batch_size": -2}, "data.batch_size=-2"),
    ({"num_threads": -1}, "data.num_threads=-1"),
    ({"seed": -1}, "data.seed=-1"),
    ({"seed": 2**32}, "data.seed=4294967296"),
    (
      {"source": "wikipedia"},
      "data.source='wikipedia': expected one of embedded, snapshot, text:PATH",
    ),
    ({"source": "tfds"}, "text:PATH, tfds:FOLDER, or a folder"),
    ({"tokenizer": "bpe-12"}, "tokenizer='bpe-12'"),
    ({"seq_len": 10**7}, "data.seq_len=10000000: the training split"),
  ],
)
def test_bad_fields_are_named(dataset, change, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    _with(dataset, **change)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((-1,), "start_step=-1"),
    ((0, 0, 3), "process_count=3: expected a divisor of data.batch_size=4"),
    ((0, 0, 0), "process_count=0"),
    ((0, 2, 2), "process_index=2"),
    ((0, -1, 2), "process_index=-1"),
  ],
)
def test_bad_hosts_are_named(dataset, arguments, message):
  with pytest.raises(ValueError, match=message):
    dataset.train_batches(*arguments)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [((0, 4), "seq_len=0"), ((8, 0), "batch_size=0"), ((8, 4, 0), "limit=0")],
)
def test_bad_validation_sizes_are_named(dataset, arguments, message):
  with pytest.raises(ValueError, match=message):
    dataset.validation_batches(*arguments)


def test_config_is_hashable_and_compares(config):
  assert hash(config) == hash(dataclasses.replace(config))
  assert config == dataclasses.replace(config)
  with pytest.raises(TypeError):
    DataConfig("snapshot")


def test_fewer_rows_than_a_batch_still_train(dataset, tmp_path):
  few = _with(dataset, seq_len=len(dataset.train_tokens()) // 2 - 1)
  assert len(few.train_rows()) == 2
  (batch,) = _take(few.train_batches(), 1)
  assert batch["inputs"].shape[0] == BATCH


def test_training_needs_none_of_the_extra_packages():
  program = (
    "import sys\n"
    "extra = ('pyarrow', 'tensorflow_datasets', 'sentencepiece',"
    " 'huggingface_hub', 'jax')\n"
    "sys.modules.update(dict.fromkeys(extra))\n"
    "import gdn2_jax.data.pipeline as p, gdn2_jax.data.build\n"
    "p.validate(p.DataConfig(source='snapshot'))\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
