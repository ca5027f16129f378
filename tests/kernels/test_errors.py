"""The one error measure: NumPy and JAX arrays, zeros and NaN."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.kernels.errors import relative_rms

EXACT = np.array([[3.0, -4.0], [0.0, 5.0]])


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_error_is_relative_to_the_exact_value(array):
  exact, off = array(EXACT), array(EXACT + 0.1)
  assert relative_rms(exact, exact) == 0
  assert relative_rms(off, exact) == pytest.approx(0.1 / np.sqrt(12.5))
  assert relative_rms(2 * exact, exact) == pytest.approx(1)


def test_zero_and_nan_are_seen():
  zero = np.zeros(3)
  assert relative_rms(zero, zero) == 0
  assert relative_rms(zero + 1e-9, zero) > 1e20
  assert math.isnan(relative_rms(np.array([0.0, np.nan]), np.ones(2)))
  assert relative_rms(np.array([np.inf]), np.ones(1)) == math.inf


def test_shapes_must_agree():
  with pytest.raises(AssertionError):
    relative_rms(np.ones((2, 1)), np.ones((2, 3)))
