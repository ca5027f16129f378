"""Errors of results on the chip.

An error is the relative RMS over an output or a gradient; next to it stands
the error that rounding the exact result to the dtype of the inputs would make.
The bound is one rounding step of that dtype, as in the tests.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdn2_jax.bench.gpu.part import Row

FLOAT32_BOUND = 1e-5


def compare(names: tuple[str, ...], actual: Any, exact: Any, dtype: str) -> Row:
  """A row of errors.

  Args:
    names: of the outputs.
    actual: arrays to judge.
    exact: float32 arrays.
    dtype: of the inputs, whose rounding is the unit of the errors.

  Returns:
    `errors` and `rounding` by name, `worst` (name), `bound`, `passed`.
  """
  bound = FLOAT32_BOUND
  if dtype != "float32":
    bound = float(jnp.finfo(dtype).eps)
  errors, rounding = {}, {}
  for name, x, y in zip(names, actual, exact, strict=True):
    difference, size, unit = (float(z) for z in _sizes(x, y, dtype))
    errors[name] = _ratio(difference, size)
    rounding[name] = _ratio(unit, size)
  worst = max(errors, key=lambda n: (not np.isfinite(errors[n]), errors[n]))
  return {
    "errors": {n: _plain(e) for n, e in errors.items()},
    "rounding": rounding,
    "worst": worst,
    "bound": bound,
    "passed": bool(errors[worst] <= bound),
  }


@functools.partial(jax.jit, static_argnums=2)
def _sizes(x, y, dtype):
  """RMS of the error, of the exact result, and of rounding it to dtype."""

  def rms(x):
    return jnp.sqrt(jnp.mean(jnp.square(x)))

  y = y.astype(jnp.float32)
  # Not by casts: XLA may drop a pair of them.
  bits = jnp.finfo(dtype)
  rounded = jax.lax.reduce_precision(y, bits.nexp, bits.nmant)
  return rms(x.astype(jnp.float32) - y), rms(y), rms(rounded - y)


def _ratio(difference, size):
  if size == 0:
    return 0.0 if difference == 0 else float("inf")
  return difference / size


def _plain(error):
  """JSON has no NaN and no infinity."""
  return error if np.isfinite(error) else str(error)
