"""Limited reads of a folder of many shards see all of them."""

import numpy as np
import pytest

from gdn2_jax.data.batches import InterleavedRows
from gdn2_jax.data.packed.rows import PackedRows
from gdn2_jax.data.pipeline import DataConfig, open_dataset
from tests.data.packing import borders, pack

LENGTH = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Shards of one letter each, in both splits."""
  out = tmp_path_factory.mktemp("shards") / "rows"
  texts = [letter * 20 + str(n) for letter in "abcd" for n in range(100)]
  # A line is some 35 bytes: a hundred of them make a shard.
  pack(texts, out, shard_tokens=3500, validation_fraction=0.4)
  return out


@pytest.fixture(scope="module")
def dataset(folder):
  return open_dataset(
    DataConfig(
      source=str(folder), tokenizer="bytes", seq_len=LENGTH, batch_size=4
    )
  )


def _share(ids):
  """Fraction of each letter."""
  counts = np.bincount(np.ravel(ids), minlength=259)[[*b"abcd"]]
  return counts / counts.sum()


def test_a_limited_evaluation_reads_of_every_shard_its_share(dataset):
  assert len(dataset.packed.tokens["validation"].parts) > 3
  whole = [b["inputs"] for b in dataset.validation_batches(LENGTH, 4)]
  some = [b["inputs"] for b in dataset.validation_batches(LENGTH, 4, limit=8)]
  np.testing.assert_allclose(_share(some), _share(whole), atol=0.05)
  np.testing.assert_array_equal(some, whole[:8])
  tokens = dataset.validation_tokens()
  in_order = tokens[: len(some) * 4 * LENGTH]
  assert abs(_share(in_order) - _share(whole)).max() > 0.2


def test_a_sample_of_the_training_tokens_has_all_shards(dataset):
  whole = dataset.train_tokens()
  np.testing.assert_array_equal(whole, dataset.packed.tokens["train"][:])
  some = dataset.train_tokens(limit=1000)
  assert len(some) == 1000
  np.testing.assert_allclose(_share(some), _share(whole), atol=0.05)


def test_interleaved_rows_are_all_rows_once(dataset):
  split = dataset.packed.tokens["train"], dataset.packed.offsets["train"]
  for length in (7, LENGTH, 5000):
    rows = PackedRows(*split, length, keep_partial=True)
    mixed = InterleavedRows([rows])
    expected = sorted(rows[i]["inputs"].tobytes() for i in range(len(rows)))
    found = sorted(mixed[i]["inputs"].tobytes() for i in range(len(mixed)))
    assert found == expected
  flat = PackedRows(split[0][:], borders(split[1]), LENGTH, keep_partial=True)
  alone = InterleavedRows([flat])
  for i in range(len(flat)):  # one array keeps its order
    np.testing.assert_array_equal(alone[i]["inputs"], flat[i]["inputs"])
