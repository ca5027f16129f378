"""Rows of a fixed length over a flat token array, addressed by index.

Row i of length L covers tokens iL .. iL+L: its last token is the first of the
next row, so every token but the very first is a target exactly once, whatever
L is. A row is a pure function of its index, which is what makes seeking,
sharding and resuming exact.
"""

import dataclasses

import numpy as np
from jaxtyping import Int32

from gdn2_jax.data.packed.arrays import Offsets, Tokens, borders_within

Row = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class PackedRows:
  """Random access to the rows of one split.

  Attributes:
    tokens: [tokens], any integer dtype, as one array or in shards; memory
      maps are opened by whoever made them, never on first access (reader
      threads would race).
    offsets: [documents + 1], where each document begins, likewise.
    seq_len: L.
    keep_partial: pad a last row that is shorter, instead of dropping it.
  """

  tokens: Tokens
  offsets: Offsets
  seq_len: int
  keep_partial: bool = False

  def __post_init__(self):
    if self.seq_len < 1:
      raise ValueError(f"seq_len={self.seq_len}: expected at least 1")

  def __len__(self) -> int:
    pairs = max(len(self.tokens) - 1, 0)
    return (
      -(-pairs // self.seq_len)
      if self.keep_partial
      else (pairs // self.seq_len)
    )

  def shard_borders(self) -> np.ndarray:
    """[shards + 1]: the first row that begins in each shard; all rows."""
    starts = getattr(self.tokens, "starts", np.array([0]))
    borders = np.minimum(-(-starts // self.seq_len), len(self))
    return np.append(borders[:-1] if len(starts) > 1 else 0, len(self))

  def __getitem__(self, index: int) -> Row:
    """The row as a dict of arrays [L]; see `make_row`."""
    if not 0 <= index < len(self):
      raise IndexError(f"row {index} of {len(self)}")
    return make_row(
      self.tokens, self.offsets, start=index * self.seq_len, length=self.seq_len
    )


def make_row(
  tokens: Tokens,
  offsets: Offsets,
  *,
  start: int,
  length: int,
) -> Row:
  """Cuts one row out of the concatenated documents.

  A document's EOS is a target like any token. What follows EOS is the first
  token of another document, about which nothing has been read: that target is
  masked. A document that began before the row is a segment of its own here,
  with positions counted from the row's start, because no state is carried
  from one row to the next.

  Args:
    tokens: all documents, each with its EOS.
    offsets: where each document begins, and the end of the last.
    start: index of the first input token.
    length: L; a row that reaches past the last token is padded with id 0.

  Returns:
    inputs, targets, segment_ids (1, 2, ... within the row, 0 for padding),
    positions (from 0 in each segment): int32 [L]; loss_mask: float32 [L],
    1 where the target counts.
  """
  window = np.asarray(tokens[start : start + length + 1], np.int32)
  count = len(window) - 1  # pairs of input and target
  at = np.arange(count + 1)
  # Where a segment begins, from the row's start: nothing before it matters.
  begins = np.concatenate(
    [[0], borders_within(offsets, start, start + count) - start]
  )
  segment = np.searchsorted(begins, at, side="right")
  inside = segment[:-1]
  row = {
    "inputs": window[:-1],
    "targets": window[1:],
    "segment_ids": inside,
    "positions": at[:-1] - begins[inside - 1],
    "loss_mask": (inside == segment[1:]).astype(np.float32),
  }
  return {name: _padded(values, length) for name, values in row.items()}


def padding_row(length: int) -> Row:
  """A row of padding alone: all arrays zero."""
  row = {name: np.zeros(length, np.int32) for name in _INT_KEYS}
  return row | {"loss_mask": np.zeros(length, np.float32)}


def check_batch(batch: dict[str, np.ndarray], vocab_size: int) -> None:
  """Refuses a batch with ids, positions or masks out of range.

  An embedding lookup clamps ids that are too large and wraps negative ones,
  so ids are checked on the host.

  Args:
    batch: inputs, targets, segment_ids, positions, loss_mask, each [B, L].
    vocab_size: ids of the model.

  Raises:
    ValueError: naming the array, its shape or value and what was expected.
  """
  if set(batch) != {*_INT_KEYS, "loss_mask"}:
    raise ValueError(
      f"batch: keys {sorted(batch)}, expected {_INT_KEYS} and loss_mask"
    )
  shape = batch["inputs"].shape
  for name, values in batch.items():
    kind = np.float32 if name == "loss_mask" else np.int32
    if values.dtype != kind or values.ndim != 2 or values.shape != shape:
      raise ValueError(
        f"{name}: {values.dtype} {values.shape}, expected"
        f" {np.dtype(kind)} {shape} with two axes"
      )
  for name in ("inputs", "targets"):
    _check_range(name, batch[name], vocab_size, "the vocabulary")
  _check_range("positions", batch["positions"], shape[1], "the row")
  _check_range("segment_ids", batch["segment_ids"], shape[1] + 1, "the row")
  mask = batch["loss_mask"]
  if not np.all((mask == 0) | (mask == 1)):
    raise ValueError("loss_mask: expected zeros and ones only")
  if np.any(mask[batch["segment_ids"] == 0]):
    raise ValueError("loss_mask: expected 0 where segment_ids is 0 (padding)")


_INT_KEYS = ("inputs", "targets", "segment_ids", "positions")


def _check_range(
  name: str, values: Int32[np.ndarray, "B L"], stop: int, what: str
) -> None:
  if values.size and (values.min() < 0 or values.max() >= stop):
    raise ValueError(
      f"{name}: values {values.min()} .. {values.max()}, expected"
      f" [0, {stop}) for {what}"
    )


def _padded(values: np.ndarray, length: int) -> np.ndarray:
  kind = np.float32 if values.dtype == np.float32 else np.int32
  padded = np.zeros(length, kind)
  padded[: len(values)] = values
  return padded
