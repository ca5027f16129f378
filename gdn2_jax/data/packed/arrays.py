"""Flat arrays that lie in several files, mapped and never copied whole.

A shard holds whole documents: its tokens, and where each document begins
within it. End to end the shards are one stream, and positions in that stream
are what rows are cut by, so a row may reach over a border between shards.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

_OFFSET = np.dtype("<i8")


def _map_file(path: str | os.PathLike[str], dtype: Any) -> np.ndarray:
  """A read-only memory map of a file; an empty one cannot be mapped."""
  if os.stat(path).st_size == 0:
    return np.zeros(0, dtype)
  return np.memmap(path, dtype, mode="r")


class ShardedTokens:
  """The tokens [tokens] of all shards of a split, end to end.

  Pickles as its paths: a worker process maps the files anew.

  Attributes:
    dtype: uint16 or uint32, little-endian.
  """

  def __init__(self, paths: Sequence[str | os.PathLike[str]], dtype: Any):
    self.dtype = np.dtype(dtype)
    self._paths = [os.fspath(path) for path in paths]
    self._parts = [_map_file(path, self.dtype) for path in self._paths]
    sizes = [len(part) for part in self._parts]
    self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

  def __reduce__(self) -> tuple[Any, ...]:
    return ShardedTokens, (self._paths, self.dtype)

  @property
  def starts(self) -> np.ndarray:
    """int64 [shards + 1]: where in the stream each shard begins."""
    return self._starts

  @property
  def parts(self) -> list[np.ndarray]:
    """The maps, one per shard."""
    return self._parts

  def __len__(self) -> int:
    return int(self._starts[-1])

  def __getitem__(self, where: slice) -> np.ndarray:
    """A stretch of the stream; a view where it lies in one shard."""
    start, stop, step = where.indices(len(self))
    assert step == 1, "a stream is read forwards"
    if stop <= start:
      return np.zeros(0, self.dtype)
    first = int(np.searchsorted(self._starts, start, side="right")) - 1
    pieces = []
    for index in range(first, len(self._parts)):
      base = self._starts[index]
      if base >= stop:
        break
      pieces.append(self._parts[index][max(start - base, 0) : stop - base])
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

  def __array__(self, dtype: Any = None, copy: bool | None = None):
    whole = self[: len(self)]
    return np.array(whole, dtype or self.dtype, copy=copy)


class ShardedOffsets:
  """Positions in the stream at which the documents of all shards begin.

  Each file holds int64 [documents of the shard + 1], counted from the shard's
  first token.

  Attributes:
    starts: int64 [shards + 1], see `ShardedTokens.starts`.
  """

  def __init__(self, paths: Sequence[str | os.PathLike[str]], starts: Any):
    self.starts = np.asarray(starts, np.int64)
    self._paths = [os.fspath(path) for path in paths]
    assert len(self.starts) == len(self._paths) + 1
    self._parts = [_map_file(path, _OFFSET) for path in self._paths]

  def __reduce__(self) -> tuple[Any, ...]:
    return ShardedOffsets, (self._paths, self.starts)

  @property
  def parts(self) -> list[np.ndarray]:
    """The maps, one per shard."""
    return self._parts

  def __len__(self) -> int:
    return 1 + sum(len(part) - 1 for part in self._parts)

  def within(self, start: int, stop: int) -> np.ndarray:
    """The borders p of documents with start < p <= stop: int64, ascending."""
    first = int(np.searchsorted(self.starts, start, side="right")) - 1
    found = []
    for index in range(max(first, 0), len(self._parts)):
      base = self.starts[index]
      if base > stop:
        break
      # The end of a shard is the beginning of the next one.
      part = self._parts[index][:-1]
      low, high = np.searchsorted(part, (start - base, stop - base), "right")
      found.append(part[low:high] + base)
    if stop >= self.starts[-1] > start:
      found.append(self.starts[-1:])
    return np.concatenate(found) if found else np.zeros(0, np.int64)

  def __array__(self, dtype: Any = None, copy: bool | None = None):
    whole = np.concatenate([[0], self.within(0, int(self.starts[-1]))])
    return np.array(whole, dtype or np.int64, copy=copy)


Tokens = np.ndarray | ShardedTokens
Offsets = np.ndarray | ShardedOffsets


def borders_within(offsets: Offsets, start: int, stop: int) -> np.ndarray:
  """Document borders p with start < p <= stop, of one array or of shards."""
  if isinstance(offsets, ShardedOffsets):
    return offsets.within(start, stop)
  low, high = np.searchsorted(offsets, (start, stop), "right")
  return np.asarray(offsets[low:high], np.int64)
