"""Target that kernels are traced for: device, compile-only GPU, interpreter.

Kernels are traced the same way for all three. Tests run them in the
interpreter of Mosaic GPU; the ahead-of-time check compiles them for a GPU that
is not there. Neither may be chosen by a user's call, so the choice is not an
argument of the op.

The target is read while a function is traced and is no part of the key of
jax.jit's cache: wrap a new function under each target.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

Target = Literal["device", "compile", "interpret"]

_target: contextvars.ContextVar[Target] = contextvars.ContextVar(
  "gdn2_jax_pallas_target", default="device"
)


@contextlib.contextmanager
def use(target: Target) -> Iterator[None]:
  """Traces kernels for `target` inside the with block."""
  token = _target.set(target)
  try:
    yield
  finally:
    _target.reset(token)


def current() -> Target:
  """Returns the target that kernels traced now are built for."""
  return _target.get()


def is_interpreted() -> bool:
  """Whether kernels traced now run in the CPU interpreter."""
  return current() == "interpret"


def interpret_params() -> Any:
  """The `interpret` argument of plgpu.kernel; races are always looked for."""
  if is_interpreted():
    return plgpu.InterpretGPUParams(detect_races=True)
  return False


def differentiable(
  function: Callable[..., Any],
  forward: Callable[..., Any],
  backward: Callable[..., Any],
  *,
  static: int,
) -> Callable[..., Any]:
  """A jax.custom_vjp for kernels that save something beside their inputs.

  Under remat the first pass is then the one that saves nothing: XLA cannot drop
  a kernel's outputs by itself. The interpreter's callbacks forbid it.

  Args:
    function: of arrays, and one argument that is no array.
    forward: the same, with residuals.
    backward: gradients, of that argument, residuals and cotangents.
    static: position of that argument.
  """

  def make(*, optimize_remat):
    made = jax.custom_vjp(function, nondiff_argnums=(static,))
    made.defvjp(forward, backward, optimize_remat=optimize_remat)
    return made

  on_device, interpreted = make(optimize_remat=True), make(optimize_remat=False)

  def call(*args):
    return (interpreted if is_interpreted() else on_device)(*args)

  return call
