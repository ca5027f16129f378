"""Mixtures and reader processes: one order, whoever reads it."""

import collections
import dataclasses
import multiprocessing
import time

import numpy as np
import pytest

from gdn2_jax.data import pipeline
from gdn2_jax.data.pipeline import DataConfig
from tests.data import parquet_files
from tests.data.batches import assert_equal
from tests.data.packing import pack

LENGTH = 32
BATCH = 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """Two packed folders whose tokens tell them apart."""
  root = tmp_path_factory.mktemp("mixture")
  for name, change in (("lower", str.lower), ("upper", str.upper)):
    texts = [change(t) for t in parquet_files.texts()[:60]]
    pack(texts, root / name, shard_tokens=10_000)
  return root


@pytest.fixture(scope="module")
def config(folders):
  return DataConfig(
    source=f"{folders}/lower:0.7,{folders}/upper:0.3",
    tokenizer="bytes",
    seq_len=LENGTH,
    batch_size=BATCH,
    seed=5,
  )


def _take(config, start, count, hosts=1):
  """Global batches from a step on, joined over hosts."""
  dataset = pipeline.open_dataset(config)
  parts = []
  for host in range(hosts):
    batches = dataset.train_batches(start, host, hosts)
    parts.append([next(batches) for _ in range(count)])
    batches.close()
  return [
    {name: np.concatenate([part[name] for part in step]) for name in step[0]}
    for step in zip(*parts, strict=True)
  ]


def _is_upper(row):
  text = bytes(int(t) for t in row if t < 256).decode("utf-8", "ignore")
  return text == text.upper() and text != text.lower()


@pytest.mark.slow
def test_the_same_global_batches_for_any_hosts_and_workers(config):
  straight = _take(config, 0, 12)
  for hosts in (2, 4):
    assert_equal(_take(config, 0, 12, hosts), straight)
  workers = dataclasses.replace(config, num_workers=2, num_threads=1)
  assert_equal(_take(workers, 0, 12), straight)
  workers.num_workers = 1
  # A run of 4 hosts without workers goes on with 2 hosts of one worker, then
  # with one host of none.
  pieces = _take(config, 0, 3, hosts=4)
  pieces += _take(workers, 3, 5, hosts=2)
  pieces += _take(dataclasses.replace(config, num_threads=0), 8, 4)
  assert_equal(pieces, straight)


def test_shares_are_kept_in_every_stretch(config):
  batches = _take(config, 0, 60)
  upper = np.array(
    [_is_upper(row) for batch in batches for row in batch["inputs"]]
  )
  for start in range(0, len(upper) - 100, 7):
    assert 28 <= upper[start : start + 100].sum() <= 32


def test_every_source_is_read_through_before_it_repeats(config):
  dataset = pipeline.open_dataset(config)
  sizes = [len(dataset.train_rows(part)) for part in (0, 1)]
  seen = collections.Counter(
    (_is_upper(row), row.tobytes())
    for batch in _take(config, 0, int(sizes[0] / 0.7) // BATCH)
    for row in batch["inputs"]
  )
  lower = [count for (is_upper, _), count in seen.items() if not is_upper]
  # A few rows have no letters.
  assert abs(len(lower) - sizes[0]) < 2 * BATCH
  assert max(lower) == 1  # not one row twice, almost all rows once


def test_equal_sources_are_not_read_in_step(config, folders):
  # The rows of both have equal numbers: only the seeds can tell them apart.
  batches = _take(config, 0, 20)
  rows = [row for batch in batches for row in batch["inputs"]]
  lower = [bytes(r.astype(np.uint8)) for r in rows if not _is_upper(r)][:40]
  upper = [bytes(r.astype(np.uint8)) for r in rows if _is_upper(r)][:40]
  pairs = zip(lower, upper, strict=False)
  assert sum(a.upper() == b for a, b in pairs) < 5


def test_validation_reads_every_source_evenly(config):
  dataset = pipeline.open_dataset(config)
  whole = list(dataset.validation_batches(LENGTH, 4))
  counted = sum(int(batch["loss_mask"].sum()) for batch in whole)
  expected = sum(
    part.manifest["splits"]["validation"]["tokens"]
    - part.manifest["splits"]["validation"]["documents"]
    for part in dataset.parts
  )
  assert counted == expected
  some = np.concatenate(
    [b["inputs"] for b in dataset.validation_batches(LENGTH, 4, limit=6)]
  )
  sizes = [len(part.tokens["validation"]) for part in dataset.parts]
  share = len(some) * sizes[1] / sum(sizes)
  assert abs(sum(map(_is_upper, some)) - share) <= 2
  assert dataset.validation_bytes_per_token == pytest.approx(1.0, abs=0.02)
  assert len(dataset.validation_tokens()) == sum(
    len(part.tokens["validation"]) for part in dataset.parts
  )
  sample = dataset.train_tokens(limit=1000)
  assert len(sample) == 1000


def test_fingerprint_covers_sources_and_weights(config, folders):
  def fingerprint(source):
    changed = dataclasses.replace(config, source=source)
    return pipeline.open_dataset(changed).fingerprint

  lower, upper = f"{folders}/lower", f"{folders}/upper"
  prints = [
    fingerprint(source)
    for source in (
      config.source,
      f"{lower}:0.6,{upper}:0.4",
      f"{upper}:0.7,{lower}:0.3",
      f"{lower}:1",
      lower,
    )
  ]
  assert len(set(prints)) == 4
  assert prints[3] == prints[4]  # a mixture of one is no mixture


@pytest.mark.parametrize(
  ("source", "message"),
  [
    ("a:0.5,b", "'b' in a mixture, expected NAME:WEIGHT"),
    ("a:0.5,b:0", "'b:0' in a mixture"),
    ("a:0.5,b:-1", "positive weight"),
    ("a:0.5,b:nan", "positive weight"),
    ("a:0.5,:1", "':1' in a mixture"),
    ("a:1,a:2", "a source is named twice"),
    ("text:no/such:2,embedded:1", "no/such does not exist"),
    ("no/such:1,embedded:1", "data.source='no/such': expected one of"),
    ("text:no/such", "no/such does not exist"),
  ],
)
def test_bad_mixtures_are_named(source, message):
  with pytest.raises(ValueError) as refused:
    pipeline.open_dataset(DataConfig(source=source, tokenizer="bytes"))
  assert message in str(refused.value)


def test_an_unfinished_folder_is_told_apart(tmp_path):
  (tmp_path / "rows.partial").mkdir()
  config = DataConfig(source=str(tmp_path / "rows"))
  with pytest.raises(ValueError, match="packing is unfinished"):
    pipeline.open_dataset(config)


def test_sources_of_other_tokenizers_are_refused(config, folders, tmp_path):
  pack(["some text"] * 9, tmp_path / "bpe", tokenizer="bpe-300")
  mixed = dataclasses.replace(
    config, source=f"{folders}/lower:1,{tmp_path}/bpe:1"
  )
  with pytest.raises(ValueError, match=r"data.tokenizer='bytes': .*bpe-300"):
    pipeline.open_dataset(mixed)


def test_a_killed_reader_is_an_error_not_a_wait(config):
  dataset = pipeline.open_dataset(dataclasses.replace(config, num_workers=1))
  others = multiprocessing.active_children()
  batches = dataset.train_batches()
  next(batches)
  children = multiprocessing.active_children()
  (reader,) = [child for child in children if child not in others]
  reader.kill()
  started = time.monotonic()
  with pytest.raises(RuntimeError, match="terminated unexpectedly"):
    for _ in range(10_000):
      next(batches)
  assert time.monotonic() - started < 10
  batches.close()
