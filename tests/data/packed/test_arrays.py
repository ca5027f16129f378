"""Shards end to end are one array, whatever is asked of them."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn2_jax.data.packed import arrays
from gdn2_jax.data.packed.folder import shard_name
from gdn2_jax.data.packed.rows import PackedRows
from tests.data.packing import borders as all_borders


def _write(folder, lengths):
  """Documents of given lengths per shard; (tokens, offsets) both ways."""
  folder.mkdir(exist_ok=True)
  flat, borders = [], [0]
  for index, shard in enumerate(lengths):
    tokens = np.arange(len(flat), len(flat) + sum(shard), dtype="<u2")
    offsets = np.cumsum([0, *shard], dtype="<i8")
    for kind, array in (("tokens", tokens), ("offsets", offsets)):
      (folder / shard_name("train", index, kind)).write_bytes(array.tobytes())
    flat += tokens.tolist()
    borders += (borders[-1] + offsets[1:]).tolist()
  paths = {
    kind: [folder / shard_name("train", i, kind) for i in range(len(lengths))]
    for kind in ("tokens", "offsets")
  }
  tokens = arrays.ShardedTokens(paths["tokens"], np.dtype("<u2"))
  offsets = arrays.ShardedOffsets(paths["offsets"], tokens.starts)
  return tokens, offsets, np.array(flat, "<u2"), np.array(borders, np.int64)


LENGTHS = st.lists(st.lists(st.integers(1, 7), max_size=4), min_size=1)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, length=st.integers(1, 9), data=st.data())
def test_any_stretch_equals_that_of_one_array(
  tmp_path_factory, lengths, length, data
):
  tokens, offsets, flat, borders = _write(
    tmp_path_factory.mktemp("shards"), lengths
  )
  assert len(tokens) == len(flat)
  assert len(offsets) == len(borders)
  np.testing.assert_array_equal(tokens[:], flat)
  np.testing.assert_array_equal(all_borders(offsets), borders)
  start = data.draw(st.integers(0, len(flat)))
  stop = data.draw(st.integers(start, len(flat) + 3))
  np.testing.assert_array_equal(tokens[start:stop], flat[start:stop])
  np.testing.assert_array_equal(
    arrays.borders_within(offsets, start, stop),
    arrays.borders_within(borders, start, stop),
  )
  many = PackedRows(tokens, offsets, length, keep_partial=True)
  one = PackedRows(flat, borders, length, keep_partial=True)
  assert len(many) == len(one)
  for left, right in zip(
    (many[i] for i in range(len(many))),
    (one[i] for i in range(len(one))),
    strict=True,
  ):
    for name in left:
      np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def test_rows_pickle_as_paths(tmp_path):
  lengths = [[3000, 2000], [4000]]
  tokens, offsets, flat, borders = _write(tmp_path / "shards", lengths)
  rows = PackedRows(tokens, offsets, 64)
  assert len(pickle.dumps(rows)) < 1500
  copy = pickle.loads(pickle.dumps(rows))
  for name, values in PackedRows(flat, borders, 64)[77].items():
    np.testing.assert_array_equal(copy[77][name], values)


def test_strides_are_not_offered(tmp_path):
  tokens, *_ = _write(tmp_path / "shards", [[5]])
  with pytest.raises(AssertionError, match="read forwards"):
    tokens[::2]
