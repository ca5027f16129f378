"""Comparing batches."""

import numpy as np


def assert_equal(left, right):
  """The same batches in the same order, in plain arrays of the same dtypes."""
  assert len(left) == len(right)
  for one, other in zip(left, right, strict=True):
    assert set(one) == set(other)
    for name in one:
      np.testing.assert_array_equal(one[name], other[name], err_msg=name)
      assert one[name].dtype == other[name].dtype
      assert type(one[name]) is np.ndarray
