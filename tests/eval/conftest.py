"""A corpus of a few hundred tokens, packed by hand."""

import dataclasses

import numpy as np
import pytest

VOCAB = 29
EOS = 0


@dataclasses.dataclass
class FakeTokenizer:
  vocab_size: int = VOCAB
  eos_id: int = EOS


class FakeDataset:
  """Documents of random lengths; the part of `Dataset` that eval needs."""

  validation_bytes_per_token = 3.2

  def __init__(self, rng, documents: int):
    self.tokenizer = FakeTokenizer()
    self._train = self._text(rng, documents)
    self._validation = self._text(rng, documents)

  def _text(self, rng, documents):
    parts = []
    for _ in range(documents):
      length = int(rng.integers(1, 60))
      # Each token is the last one plus 0, 1 or 2: a bigram can learn it.
      steps = rng.integers(0, 3, length)
      parts += [1 + (rng.integers(28) + np.cumsum(steps)) % 28, [EOS]]
    return np.concatenate(parts).astype(np.uint16)

  def train_tokens(self):
    return self._train

  def validation_tokens(self):
    return self._validation

  def validation_batches(self, seq_len, batch_size, limit=None):
    assert limit is None
    stream = self._validation.astype(np.int32)
    pairs = len(stream) - 1
    size = batch_size * seq_len
    padded = -(-pairs // size) * size

    def shaped(values, dtype):
      values = np.pad(np.asarray(values, dtype), (0, padded - pairs))
      return values.reshape(-1, batch_size, seq_len)

    ends = stream[:-1] == EOS
    document = np.cumsum(ends) - ends
    segment_ids = np.zeros(pairs, np.int32)
    positions = np.zeros(pairs, np.int32)
    for start in range(0, pairs, seq_len):
      row = slice(start, min(start + seq_len, pairs))
      segment_ids[row] = document[row] - document[start] + 1
      for segment in np.unique(segment_ids[row]):
        at = start + np.flatnonzero(segment_ids[row] == segment)
        positions[at] = np.arange(len(at))
    fields = {
      "inputs": shaped(stream[:-1], np.int32),
      "targets": shaped(stream[1:], np.int32),
      "segment_ids": shaped(segment_ids, np.int32),
      "positions": shaped(positions, np.int32),
      "loss_mask": shaped(~ends, np.float32),
    }
    for i in range(padded // size):
      yield {name: array[i] for name, array in fields.items()}


@pytest.fixture
def dataset(rng):
  return FakeDataset(rng, documents=16)
