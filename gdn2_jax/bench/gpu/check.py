"""Check of every kernel on the GPU, against "xla" in float32.

Both get the same rounded inputs. Errors stand next to that of rounding the
exact result; the bound is one rounding step of the inputs' dtype, as in the
tests.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdn2_jax.bench.gpu import cases
from gdn2_jax.bench.gpu.part import Job, Program, Recorder, Row
from gdn2_jax.kernels.errors import relative_rms

_FLOAT32_BOUND = 1e-5


def run(recorder: Recorder, rehearse: bool) -> None:
  """Writes a row for every kernel and shape."""
  jobs = {}
  for case in cases.checked(rehearse):
    exact = _lowering(case, case.truth, exact=True)
    for kernel in case.kernels:
      lowerings = _lowering(case, kernel, exact=False), exact
      job = Job(functools.partial(_measure, case), lowerings)
      jobs[f"{case.name}, {kernel}"] = job
  recorder.run(jobs)


def _lowering(
  case: cases.Case, implementation: str, exact: bool
) -> Callable[[], Any]:
  """Lowering of a case's outputs and gradients, in float32 if exact."""

  def run(inputs, cotangents):
    if exact:
      inputs = tuple(x.astype(jnp.float32) for x in inputs)
    call = case.both if case.gradients else case.forward
    return call(implementation, inputs, cotangents)

  return lambda: jax.jit(run).lower(*jax.eval_shape(case.make))


def _measure(case: cases.Case, actual: Program, exact: Program) -> Row:
  """Runs the kernel and the truth, and compares them."""
  actual, exact = actual(), exact()
  arguments = case.make()
  want = exact(*arguments)
  names = case.outputs + case.gradients
  return compare(names, actual(*arguments), want, case.dtype)


def compare(names: tuple[str, ...], actual: Any, exact: Any, dtype: str) -> Row:
  """Row of relative RMS errors by output, computed on the device.

  `exact` is float32, `dtype` that of the inputs. `rounding` are the errors of
  rounding the exact outputs to it; `worst` is the name of an output.
  """
  info = jnp.finfo(dtype)
  bound = _FLOAT32_BOUND if dtype == "float32" else float(info.eps)
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
