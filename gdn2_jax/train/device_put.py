"""Transfer of this process's rows of a batch to arrays over all devices."""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Sharding

BATCH_DTYPES = {
  "inputs": "int32",
  "targets": "int32",
  "segment_ids": "int32",
  "loss_mask": "float32",
}


@dataclasses.dataclass(frozen=True)
class Part:
  """The `index`-th of `count` equal parts of the rows of every batch."""

  index: int = 0
  count: int = 1


def part_to_read(sharding: Sharding, batch_size: int, seq_len: int) -> Part:
  """The rows [B / count, T] that the devices of this process need."""
  # Processes whose devices split the tokens of a row, or the heads of the
  # model, read the same part.
  indices = sharding.addressable_devices_indices_map((batch_size, seq_len))
  ranges = {rows.indices(batch_size)[:2] for rows, _ in indices.values()}
  first = min(start for start, _ in ranges)
  size = max(stop for _, stop in ranges) - first
  # Devices in an order that scatters the rows of a process: read them all.
  covered = sum(stop - start for start, stop in ranges) == size
  if not covered or batch_size % size or first % size:
    return Part()
  return Part(index=first // size, count=batch_size // size)


def put_batch(
  batch: Mapping[str, np.ndarray], sharding: Sharding, part: Part = Part()
) -> dict[str, jax.Array]:
  """The rows of `part` [B / count, T] as global arrays [B, T], by name."""

  def put(rows: np.ndarray) -> jax.Array:
    first, size = part.index * len(rows), part.count * len(rows)

    def shard(index):
      start, stop, _ = index[0].indices(size)
      assert first <= start and stop <= first + len(rows)
      return rows[start - first : stop - first, index[1]]

    return jax.make_array_from_callback((size, rows.shape[1]), sharding, shard)

  # This transfer is meant; the loop disallows all others.
  with jax.transfer_guard("allow"):
    return {name: put(batch[name]) for name in BATCH_DTYPES}
