"""Batches whose order is a function of the step.

The training stream is rows -> seeded shuffle, anew each epoch -> repeat ->
mix of sources -> global batches. Host h of H takes the h-th H-th of every
global batch, so the concatenation over hosts is the same for any H, and the
whole state of the stream is the step number: seeking to any step costs the
same as to the next.

This module never imports JAX itself; grain does, so it is imported on use.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from absl import flags

from gdn2_jax.data.packed.rows import PackedRows, check_batch, padding_row

Batch = dict[str, np.ndarray]

# Batches that a reader process keeps ready.
_WORKER_BUFFER = 2


class TrainBatches(Iterator[Batch]):
  """An endless iterator whose whole state is `step`, the next step's number.

  Arguments are those of `Dataset.train_batches` and `DataConfig`; weights are
  shares of rows, kept exactly in every stretch of the stream rather than drawn
  (to a hundredth of the smallest weight).
  """

  def __init__(
    self,
    sources: Sequence[PackedRows],
    weights: Sequence[float],
    *,
    seed: int,
    batch_size: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 0,
    num_workers: int = 0,
  ):
    import grain  # imports JAX, which numpy-only callers need not pay for

    seeds = source_seeds(seed, len(sources))
    streams = [
      grain.MapDataset.source(rows).seed(own).shuffle().repeat()
      for rows, own in zip(sources, seeds, strict=True)
    ]
    mixed = streams[0]
    if len(streams) > 1:
      mixed = grain.MapDataset.mix(streams, list(weights))
    # The stream has no end, so nothing is dropped; the exact ceiling that
    # keeps a remainder overflows at one row per host.
    self._batches = mixed.batch(
      batch_size // process_count, drop_remainder=True
    )
    self._host = (process_index, process_count)
    self._workers = num_workers
    self._options = grain.ReadOptions(
      num_threads=num_threads, prefetch_buffer_size=2 * num_threads
    )
    self._iterator = None
    self.seek(start_step)

  def seek(self, step: int) -> None:
    """Makes `step` the next one; costs the same for any step."""
    import grain

    self.close()
    # The stream is cut at the step: the position that grain's workers save fits
    # no other number of them.
    host, count = self._host
    own = self._batches[host + step * count :: count]
    batches = own.to_iter_dataset(self._options)
    if self._workers:
      # They take their flags from absl, which may not have parsed any.
      if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
      batches = batches.mp_prefetch(
        grain.MultiprocessingOptions(
          num_workers=self._workers, per_worker_buffer_size=_WORKER_BUFFER
        )
      )
    self._iterator = iter(batches)
    self.step = step

  def __next__(self) -> Batch:
    batch = next(self._iterator)
    if self._workers:
      # Copied: the worker's shared memory ends with the worker.
      batch = {name: np.array(values) for name, values in batch.items()}
    self.step += 1
    return batch

  def close(self) -> None:
    """Stops the reader threads and processes."""
    if self._iterator is not None:
      self._iterator.close()
      self._iterator = None


class InterleavedRows:
  """Rows of several sources, every shard spread evenly over the whole.

  A prefix of any length holds of every shard about its share, so a limited
  evaluation sees all of them. One source of one shard keeps its order.
  """

  def __init__(self, sources: Sequence[PackedRows]):
    self._sources = sources
    self.seq_len = sources[0].seq_len
    places, owners, indices = [], [], []
    for number, rows in enumerate(sources):
      for first, stop in itertools.pairwise(rows.shard_borders()):
        count = stop - first
        places.append((np.arange(count) + 0.5) / max(count, 1))
        owners.append(np.full(count, number, np.int32))
        indices.append(np.arange(first, stop))
    order = np.argsort(np.concatenate(places), kind="stable")
    self._owner = np.concatenate(owners)[order]
    self._index = np.concatenate(indices)[order]

  def __len__(self) -> int:
    return len(self._owner)

  def __getitem__(self, index: int) -> Batch:
    return self._sources[self._owner[index]][int(self._index[index])]


def source_seeds(seed: int, count: int) -> list[int]:
  """One seed per source: equal sources must not have equal orders."""
  others = np.random.SeedSequence(seed).generate_state(max(count - 1, 1))
  return [seed, *(int(other) for other in others)][:count]


def fixed_batches(
  rows: InterleavedRows,
  batch_size: int,
  limit: int | None,
  vocab_size: int,
) -> Iterator[Batch]:
  """All rows once, in order; the last batch is padded to the same shape."""
  count = -(-len(rows) // batch_size)
  for index in range(count if limit is None else min(count, limit)):
    start = index * batch_size
    stop = min(start + batch_size, len(rows))
    members = [rows[i] for i in range(start, stop)]
    members += [padding_row(rows.seq_len)] * (batch_size - len(members))
    batch = {name: np.stack([r[name] for r in members]) for name in members[0]}
    check_batch(batch, vocab_size)
    yield batch
