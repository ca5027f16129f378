"""Check of every kernel on the GPU, against "xla" in float32.

Both get the same rounded inputs; errors.py says what is compared.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gdn2_jax.bench.gpu import cases
from gdn2_jax.bench.gpu.errors import compare
from gdn2_jax.bench.gpu.part import Compiler, Recorder, Row, wait


def run(recorder: Recorder, rehearse: bool) -> None:
  """Writes a row for every kernel and shape."""
  compiler = Compiler(2 if rehearse else 5)
  jobs = {}
  for case in cases.checked(rehearse):
    labels = {f"{case.name}, {kernel}": kernel for kernel in case.kernels}
    missing = {x: k for x, k in labels.items() if x not in recorder.done}
    if not missing:
      continue
    exact = compiler.submit(_lower(case, case.truth, exact=True))
    for label, kernel in missing.items():
      actual = compiler.submit(_lower(case, kernel, exact=False))
      jobs[label] = functools.partial(_finish, case, actual, exact, recorder)
  for label, job in jobs.items():
    recorder.run(label, job)
  compiler.close()


def _lower(
  case: cases.Case, implementation: str, exact: bool
) -> Callable[[], Any]:
  """Lowering of a case's outputs and gradients, in float32 if exact."""

  def run(inputs, cotangents):
    if exact:
      inputs = tuple(x.astype(jnp.float32) for x in inputs)
    call = case.both if case.gradients else case.forward
    return call(implementation, inputs, cotangents)

  return lambda: jax.jit(run).lower(*jax.eval_shape(case.make))


def _finish(
  case: cases.Case, actual: Any, exact: Any, recorder: Recorder
) -> Row:
  """Runs the kernel and the truth, and compares them."""
  actual, exact = wait(actual, recorder), wait(exact, recorder)
  arguments = case.make()
  want = exact(*arguments)
  names = case.outputs + case.gradients
  return compare(names, actual(*arguments), want, case.dtype)
