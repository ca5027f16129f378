"""Flat arrays in several memory-mapped files.

A shard holds whole documents: its tokens, and where each document begins
within it. End to end the shards are one stream, and positions in that stream
are what rows are cut by, so a row may reach over a border between shards.

Both classes pickle as their paths: a worker process maps the files anew, as a
memory map pickles as a copy of its file.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

_OFFSET = np.dtype("<i8")


def _map_files(paths: Sequence[str], dtype: np.dtype) -> list[np.ndarray]:
  """Read-only memory maps of files; an empty one cannot be mapped."""
  return [
    np.memmap(path, dtype, mode="r")
    if os.stat(path).st_size
    else np.zeros(0, dtype)
    for path in paths
  ]


class ShardedTokens:
  """The tokens [tokens] of all shards of a split, end to end.

  Attributes:
    dtype: uint16 or uint32, little-endian.
    parts: the maps, one per shard.
    starts: int64 [shards + 1], where in the stream each shard begins.
  """

  def __init__(self, paths: Sequence[str | os.PathLike[str]], dtype: Any):
    self.dtype = np.dtype(dtype)
    self._paths = [os.fspath(path) for path in paths]
    self.parts = _map_files(self._paths, self.dtype)
    sizes = [len(part) for part in self.parts]
    self.starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

  def __reduce__(self) -> tuple[Any, ...]:
    return ShardedTokens, (self._paths, self.dtype)

  def __len__(self) -> int:
    return int(self.starts[-1])

  def __getitem__(self, where: slice) -> np.ndarray:
    """A stretch of the stream; a view where it lies in one shard."""
    start, stop, step = where.indices(len(self))
    assert step == 1, "a stream is read forwards"
    if stop <= start:
      return np.zeros(0, self.dtype)
    first = int(np.searchsorted(self.starts, start, side="right")) - 1
    pieces = []
    for part, base in zip(
      self.parts[first:], self.starts[first:], strict=False
    ):
      if base >= stop:
        break
      pieces.append(part[max(start - base, 0) : stop - base])
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


class ShardedOffsets:
  """Borders of documents in the stream of a split.

  Attributes:
    parts: int64 [documents of the shard + 1], one map per shard, each from 0.
    starts: int64 [shards + 1], where in the stream each shard begins.
  """

  def __init__(
    self, paths: Sequence[str | os.PathLike[str]], starts: np.ndarray
  ):
    self._paths = [os.fspath(path) for path in paths]
    self.starts = starts
    self.parts = _map_files(self._paths, _OFFSET)

  def __reduce__(self) -> tuple[Any, ...]:
    return ShardedOffsets, (self._paths, self.starts)

  def __len__(self) -> int:
    return 1 + sum(len(part) - 1 for part in self.parts)

  def within(self, start: int, stop: int) -> np.ndarray:
    """The borders p of documents with start < p <= stop: int64, ascending."""
    first = max(int(np.searchsorted(self.starts, start, side="right")) - 1, 0)
    found = [np.zeros(0, np.int64)]
    for part, base in zip(
      self.parts[first:], self.starts[first:], strict=False
    ):
      if base >= stop:
        break
      # The beginning of a shard is the end of the one before.
      ends = part[1:]
      low, high = np.searchsorted(ends, (start - base, stop - base), "right")
      found.append(ends[low:high] + base)
    return np.concatenate(found)


Tokens = np.ndarray | ShardedTokens
Offsets = np.ndarray | ShardedOffsets


def borders_within(offsets: Offsets, start: int, stop: int) -> np.ndarray:
  """Document borders p with start < p <= stop, of one array or of shards."""
  if isinstance(offsets, ShardedOffsets):
    return offsets.within(start, stop)
  low, high = np.searchsorted(offsets, (start, stop), "right")
  return np.asarray(offsets[low:high], np.int64)
