"""Segments of packed rows, on rows small enough to read."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn2_jax.ops.segments import (
  drop_padding,
  reset_counts,
  segment_positions,
  segment_starts,
)

# The same id twice is two segments; padding inside a segment is transparent.
IDS = [[0, 4, 4, 0, 4, 2, 0, 0, 4, 4, 0], [7, 7, 0, 7, 7, 7, 7, 7, 7, 9, 9]]


def test_starts_and_counts():
  ids = jnp.asarray(IDS, jnp.int32)
  starts = [[5, 8], [9]]
  for row, want in zip(segment_starts(ids), starts, strict=True):
    assert np.flatnonzero(row).tolist() == want
  np.testing.assert_array_equal(
    reset_counts(ids),
    [[0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2], [0] * 9 + [1, 1]],
  )


def test_positions_continue_the_first_segment_only():
  first = jnp.array([0, 100], jnp.int32)
  got = segment_positions(jnp.asarray(IDS, jnp.int32), first)
  valid = np.asarray(IDS) != 0
  assert got[0][valid[0]].tolist() == [0, 1, 2, 0, 0, 1]
  assert got[1][valid[1]].tolist() == [*range(100, 108), 0, 1]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=12, max_size=12))
def test_positions_equal_a_token_by_token_count(row):
  ids = jnp.asarray([row], jnp.int32)
  got = np.asarray(segment_positions(ids, jnp.array([5], jnp.int32)))[0]
  last, position = None, 4
  for t, segment in enumerate(row):
    if segment == 0:
      continue
    position = 0 if last not in (None, segment) else position + 1
    last = segment
    assert got[t] == position


def test_drop_padding_replaces_nan():
  ids = jnp.array([[1, 0]], jnp.int32)
  (x,) = drop_padding(ids, jnp.full((1, 2, 1, 1), jnp.nan))
  assert np.isnan(x[0, 0, 0, 0]) and x[0, 1, 0, 0] == 0
