"""Conditions under which a kernel may run: device, call, self-check.

Kernels are imported when a call may need them, never before: on a machine
without a GPU nothing of Pallas or Triton is loaded.
"""

from collections.abc import Callable
from typing import Any

import jax

from gdn2_jax.kernels import cases, self_check, target

HOPPER = "9.0"
IMPLEMENTATIONS = ("xla", "mosaic_gpu")


def device_of(x: Any) -> Any:
  """Device of a call on x; under jit, the default device."""
  if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
    return next(iter(x.devices()))
  default = jax.config.jax_default_device
  if default is None or isinstance(default, str):
    return jax.local_devices(backend=default)[0]
  return default


def hopper_reason(x: Any) -> str | None:
  """Why kernels for Hopper cannot run a call on x, or None."""
  device = device_of(x) if target.needs_device() else None
  capability = getattr(device, "compute_capability", None)
  if device is None or str(capability) == HOPPER:
    return None
  found = device.device_kind
  if capability is not None:
    found += f" of compute capability {capability}"
  return f"needs an NVIDIA GPU of compute capability {HOPPER}, found {found}"


def is_right_here(
  name: str,
  run: Callable[..., Any],
  reference: Callable[..., Any],
  case: str,
  x: Any,
) -> bool:
  """self_check.passes with that case on the device of a call on x."""
  if not target.needs_device():
    return True
  make_case = getattr(cases, case)
  return self_check.passes(
    name, run, reference, make_case, x.dtype, device_of(x)
  )


def use_kernel(
  op: str,
  implementation: str | None,
  x: Any,
  unsupported_reason: Callable[[], str | None],
  is_right: Callable[[], bool],
) -> bool:
  """True if the kernel for Hopper runs a call that "xla" runs as well.

  Args:
    op: Name of the op, for errors.
    implementation: As given by the caller; "mosaic_gpu" raises
      NotImplementedError where it cannot run the call.
    x: An array of the call.
    unsupported_reason: Why the kernel cannot run the call, on any device.
    is_right: True if it passed its self-check here; called if None chooses.
  """
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(
      f"{op}: implementation: got {implementation!r}, expected None or one of"
      f" {', '.join(IMPLEMENTATIONS)}"
    )
  if implementation == "xla":
    return False
  reason = hopper_reason(x) or unsupported_reason()
  if implementation is None:
    return reason is None and is_right()
  if reason is not None:
    raise NotImplementedError(f"{op}: {implementation}: {reason}")
  return True
