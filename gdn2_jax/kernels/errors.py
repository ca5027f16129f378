"""Relative RMS error: the measure of self-check, benchmarks and tests."""

from typing import Any

import numpy as np

_TINY = float(np.finfo(np.float32).tiny)  # what float32 cannot hold is 0


def relative_rms(actual: Any, exact: Any) -> float:
  """Root mean square of the error over that of the exact value.

  Args:
    actual: NumPy or JAX array; NaN makes the result NaN.
    exact: Array of the same shape. Both are subtracted and squared as they
      are: cast them first, to float64 where the error may be tiny.
  """
  assert actual.shape == exact.shape, (actual.shape, exact.shape)
  return _rms(actual - exact) / max(_rms(exact), _TINY)


def _rms(x):
  return float((x * x).mean()) ** 0.5
