"""Layouts against the loops that define them."""

import ml_dtypes
import numpy as np
import pytest

from gdn2_jax.interop import layouts


def test_rows_of_fused_projections_by_query_group(rng):
  d, heads, groups, channels = 5, 6, 2, 4
  fused = rng.normal(size=((heads + 2 * groups) * channels, d))
  ours = ((d, heads, channels), (d, groups, channels), (d, groups, channels))
  layout = layouts.FusedQKV()
  assert layout.theirs(*ours) == fused.shape
  q, k, v = layout.unpack(fused, *ours)
  row = 0
  for group in range(groups):
    for head in range(group * 3, group * 3 + 3):
      assert (q[:, head] == fused[row : row + channels].T).all()
      row += channels
    assert (k[:, group] == fused[row : row + channels].T).all()
    row += channels
    assert (v[:, group] == fused[row : row + channels].T).all()
    row += channels
  assert (layout.pack(q, k, v) == fused).all()


def test_the_newest_tap_is_the_last_of_ours(rng):
  stored = rng.normal(size=(6, 1, 4))
  (ours,) = layouts.Conv().unpack(stored, (4, 2, 3))
  x = rng.normal(size=(4, 6))  # the last is the newest
  # Cross-correlation: position i of the kernel meets input i of the window.
  expected = np.einsum("cw,wc->c", stored[:, 0], x)
  assert np.allclose(
    np.einsum("whk,whk->hk", ours, x.reshape(4, 2, 3)).ravel(), expected
  )
  (flipped,) = layouts.Conv("newest_first").unpack(stored, (4, 2, 3))
  assert (flipped == ours[::-1]).all()


def test_squares_tell_no_layout():
  assert layouts.Conv().accepts((4, 1, 4), (4, 2, 2))
  assert not layouts.Conv().accepts((4, 4), (4, 2, 2))


@pytest.mark.parametrize(
  ("layout", "shapes"),
  [
    (layouts.Layout(), [(3, 2)]),
    (layouts.Flat(), [(3, 2)]),
    (layouts.Linear(), [(5, 3, 2)]),
    (layouts.Linear(), [(5, 3)]),
    (layouts.Linear(in_axes=2), [(3, 2, 5)]),
    (layouts.Conv(), [(4, 3, 2)]),
    (layouts.Conv("newest_first"), [(4, 3, 2)]),
    (layouts.FusedQKV(), [(5, 4, 3), (5, 2, 3), (5, 2, 3)]),
  ],
)
def test_pack_is_the_inverse_of_unpack(rng, layout, shapes):
  ours = [rng.normal(size=shape).astype(ml_dtypes.bfloat16) for shape in shapes]
  theirs = layout.pack(*ours)
  assert theirs.shape == layout.theirs(*shapes)
  assert layout.accepts(theirs.shape, *shapes)
  for a, b in zip(layout.unpack(theirs, *shapes), ours, strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert a.tobytes() == b.tobytes()


def test_tied_gates_and_repeated_heads(rng):
  gate, d = rng.normal(size=(2, 5)), 5
  b, w = layouts.TiedGates().unpack(gate, (d, 2, 3), (d, 4, 4))
  for head in range(2):
    assert (b[:, head] == gate[head][:, None]).all()
  for head in range(4):
    assert (w[:, head] == gate[head // 2][:, None]).all()
  q = rng.normal(size=(2 * 3, d))
  layout = layouts.RepeatedHeads(layouts.Linear(), 2)
  (repeated,) = layout.unpack(q, (d, 4, 3))
  for head in range(4):
    assert (repeated[:, head] == q[(head // 2) * 3 :][:3].T).all()
