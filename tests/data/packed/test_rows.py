"""Rows by index: a hand-made example, a naive loop, and refusals."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn2_jax.data.packed.rows import (
  PackedRows,
  check_batch,
  make_row,
  padding_row,
)

EOS = 9
# Three documents: [1 2 3 EOS] [4 EOS] [5 6 7 EOS]
TOKENS = np.array([1, 2, 3, EOS, 4, EOS, 5, 6, 7, EOS], np.uint16)
OFFSETS = np.array([0, 4, 6, 10], np.int64)


def _lists(row):
  return {name: values.tolist() for name, values in row.items()}


def test_hand_made_rows():
  rows = PackedRows(TOKENS, OFFSETS, 5, keep_partial=True)
  assert len(rows) == 2
  assert _lists(rows[0]) == {
    "inputs": [1, 2, 3, EOS, 4],
    "targets": [2, 3, EOS, 4, EOS],
    "segment_ids": [1, 1, 1, 1, 2],
    "positions": [0, 1, 2, 3, 0],
    "loss_mask": [1, 1, 1, 0, 1],  # nothing predicts 4, the EOS after it is
  }
  assert _lists(rows[1]) == {
    "inputs": [EOS, 5, 6, 7, 0],
    "targets": [5, 6, 7, EOS, 0],
    "segment_ids": [1, 2, 2, 2, 0],  # the rest of [4 EOS] is segment 1 here
    "positions": [0, 0, 1, 2, 0],
    "loss_mask": [0, 1, 1, 1, 0],
  }
  assert len(PackedRows(TOKENS, OFFSETS, 5)) == 1
  assert len(PackedRows(TOKENS, OFFSETS, 9)) == 1
  assert len(PackedRows(TOKENS, OFFSETS, 10)) == 0


def test_dtypes_and_padding_row():
  row = make_row(TOKENS, OFFSETS, start=0, length=4)
  kinds = {name: values.dtype for name, values in row.items()}
  assert kinds.pop("loss_mask") == np.float32
  assert set(kinds.values()) == {np.dtype(np.int32)}
  assert {n: v.dtype for n, v in padding_row(4).items()} == {
    n: v.dtype for n, v in row.items()
  }
  assert not any(values.any() for values in padding_row(4).values())


def _naive(documents, length):
  """The same rows, token by token over (document, place) pairs."""
  flat = [
    (token, index, place == 0)
    for index, document in enumerate(documents)
    for place, token in enumerate([*document, EOS])
  ]
  rows = []
  for start in range(0, len(flat) - 1, length):
    row = {"inputs": [], "targets": [], "segment_ids": [], "positions": []}
    row["loss_mask"] = []
    segment, position = 1, 0
    for at in range(start, start + length):
      if at + 1 >= len(flat):
        for values in row.values():
          values.append(0)
        continue
      token, _, begins = flat[at]
      if at > start and begins:
        segment, position = segment + 1, 0
      target, _, target_begins = flat[at + 1]
      row["inputs"].append(token)
      row["targets"].append(target)
      row["segment_ids"].append(segment)
      row["positions"].append(position)
      row["loss_mask"].append(0 if target_begins else 1)
      position += 1
    rows.append(row)
  return rows


DOCUMENTS = st.lists(
  st.lists(st.integers(0, 8), min_size=1, max_size=12), min_size=1, max_size=9
)


@settings(max_examples=60, deadline=None)
@given(documents=DOCUMENTS, length=st.integers(1, 20))
def test_rows_equal_a_naive_loop(documents, length):
  flat = [token for document in documents for token in [*document, EOS]]
  tokens = np.asarray(flat, np.uint16)
  sizes = [len(document) + 1 for document in documents]
  offsets = np.cumsum([0, *sizes])
  rows = PackedRows(tokens, offsets, length, keep_partial=True)
  found = [rows[i] for i in range(len(rows))]
  assert [_lists(row) for row in found] == _naive(documents, length)
  # Every token but the first of each document is a target exactly once.
  counted = sum(row["loss_mask"].sum() for row in found)
  assert counted == len(flat) - len(documents)
  for row in found:
    check_batch({name: v[None] for name, v in row.items()}, EOS + 1)
  whole = PackedRows(tokens, offsets, length)
  assert len(whole) == (len(flat) - 1) // length
  for i in range(len(whole)):
    assert _lists(whole[i]) == _lists(found[i])


def test_empty_split_has_no_rows():
  empty = np.zeros(0, np.uint16)
  rows = PackedRows(empty, np.zeros(1, np.int64), 4, keep_partial=True)
  assert len(rows) == 0


def test_uint32_ids_survive():
  tokens = np.array([70000, 65536, 1], np.uint32)
  row = make_row(tokens, np.array([0, 3]), start=0, length=2)
  assert row["inputs"].tolist() == [70000, 65536]


def test_rows_are_picklable_and_bounded():
  rows = pickle.loads(pickle.dumps(PackedRows(TOKENS, OFFSETS, 5)))
  assert _lists(rows[0]) == _lists(PackedRows(TOKENS, OFFSETS, 5)[0])
  for index in (-1, 1):
    with pytest.raises(IndexError, match=f"row {index} of 1"):
      rows[index]
  with pytest.raises(ValueError, match="seq_len=0"):
    PackedRows(TOKENS, OFFSETS, 0)


def _batch():
  rows = PackedRows(TOKENS, OFFSETS, 5, keep_partial=True)
  return {name: np.stack([rows[0][name], rows[1][name]]) for name in rows[0]}


def test_check_batch_accepts():
  check_batch(_batch(), EOS + 1)
  padding = {name: v[None] for name, v in padding_row(3).items()}
  check_batch(padding, 1)


@pytest.mark.parametrize(
  ("name", "value", "message"),
  [
    ("inputs", EOS + 1, r"inputs: values 0 \.\. 10, expected \[0, 10\)"),
    ("inputs", -1, r"inputs: values -1 \.\. 9"),
    ("targets", EOS + 1, r"targets: values 0 \.\. 10"),
    ("targets", -1, r"targets: values -1 "),
    ("positions", 5, r"positions: values 0 \.\. 5, expected \[0, 5\)"),
    ("segment_ids", -1, "segment_ids: values -1 "),
    ("segment_ids", 6, r"segment_ids: values 0 \.\. 6"),
    ("loss_mask", 0.5, "loss_mask: expected zeros and ones"),
    ("loss_mask", np.nan, "loss_mask: expected zeros and ones"),
  ],
)
def test_check_batch_refuses_values(name, value, message):
  batch = _batch()
  batch[name][0, 1] = value
  with pytest.raises(ValueError, match=message):
    check_batch(batch, EOS + 1)


def test_check_batch_refuses_shapes():
  batch = _batch()
  with pytest.raises(ValueError, match="loss_mask: expected 0 where"):
    check_batch(batch | {"loss_mask": np.ones((2, 5), np.float32)}, EOS + 1)
  with pytest.raises(ValueError, match=r"targets: int64 \(2, 5\)"):
    wide = batch["targets"].astype(np.int64)
    check_batch(batch | {"targets": wide}, EOS + 1)
  with pytest.raises(ValueError, match=r"positions: int32 \(2, 4\)"):
    check_batch(batch | {"positions": batch["positions"][:, 1:]}, EOS + 1)
  with pytest.raises(ValueError, match=r"inputs: int32 \(5,\)"):
    check_batch({name: v[0] for name, v in batch.items()}, EOS + 1)
  del batch["positions"]
  with pytest.raises(ValueError, match="batch: keys"):
    check_batch(batch, EOS + 1)
