"""Errors of results on the GPU, next to the error of rounding alone.

The bound is one rounding step of the inputs' dtype, as in the tests.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdn2_jax.bench.gpu.part import Row
from gdn2_jax.kernels.errors import relative_rms

FLOAT32_BOUND = 1e-5


def compare(names: tuple[str, ...], actual: Any, exact: Any, dtype: str) -> Row:
  """Row of relative RMS errors by output, computed on the device.

  Args:
    names: Names of the outputs.
    actual: Arrays to judge.
    exact: Float32 arrays.
    dtype: The inputs' dtype.

  Returns:
    `errors`, and in `rounding` the errors of rounding the exact output to
    `dtype`, by name; `worst` (a name), `bound`, `passed`.
  """
  info = jnp.finfo(dtype)
  bound = FLOAT32_BOUND if dtype == "float32" else float(info.eps)
  errors, rounding = {}, {}
  for name, x, y in zip(names, actual, exact, strict=True):
    y = y.astype(jnp.float32)
    # Not by casts: XLA may drop a pair of them.
    rounded = jax.lax.reduce_precision(y, info.nexp, info.nmant)
    errors[name] = relative_rms(x.astype(jnp.float32), y)
    rounding[name] = relative_rms(rounded, y)
  worst = max(errors, key=lambda n: (not np.isfinite(errors[n]), errors[n]))
  return {
    # JSON has no NaN and no infinity.
    "errors": {n: e if np.isfinite(e) else str(e) for n, e in errors.items()},
    "rounding": rounding,
    "worst": worst,
    "bound": bound,
    "passed": bool(errors[worst] <= bound),
  }
