"""Target that ops and kernels are traced for; the device here by default.

Tests run kernels in the interpreter of Mosaic GPU, the ahead-of-time check
compiles them for a GPU that is not there, and exported programs run on other
machines. None of these is chosen by a user's call, so the choice is not an
argument of the ops.

The target is read while a function is traced and is no part of the key of
jax.jit's cache: wrap a new function under each target.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax

# "compile" and "interpret" are for kernels; a backend's name is for ops that
# want the same sums in other pieces there, and leaves kernels to the device.
Target = Literal["device", "compile", "interpret", "cpu", "gpu", "tpu"]

_target: contextvars.ContextVar[Target] = contextvars.ContextVar(
  "gdn2_jax_target", default="device"
)


@contextlib.contextmanager
def use(target: Target) -> Iterator[None]:
  """Traces ops and kernels for `target` inside the with block."""
  token = _target.set(target)
  try:
    yield
  finally:
    _target.reset(token)


def current() -> Target:
  """The target of what is traced now."""
  return _target.get()


def backend() -> str:
  """The backend that ops traced now will run on."""
  target = current()
  return target if target in ("cpu", "gpu", "tpu") else jax.default_backend()


def needs_device() -> bool:
  """True if kernels traced now will run on the device here."""
  return current() not in ("compile", "interpret")


def is_interpreted() -> bool:
  """True if kernels traced now run in the CPU interpreter."""
  return current() == "interpret"


def interpret_params() -> Any:
  """The `interpret` argument of plgpu.kernel; races are always looked for."""
  if is_interpreted():
    # Ops read the target where nothing of Pallas is loaded.
    from jax.experimental.pallas import mosaic_gpu as plgpu

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
    function: function of arrays, and of one argument that is no array.
    forward: the same function, which also returns residuals.
    backward: function of that argument, residuals and cotangents, which
      returns the gradients.
    static: position of the argument that is no array.
  """

  def make(*, optimize_remat):
    made = jax.custom_vjp(function, nondiff_argnums=(static,))
    made.defvjp(forward, backward, optimize_remat=optimize_remat)
    return made

  on_device, interpreted = make(optimize_remat=True), make(optimize_remat=False)

  def call(*args):
    return (interpreted if is_interpreted() else on_device)(*args)

  return call
