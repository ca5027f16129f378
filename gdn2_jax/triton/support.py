"""Conditions under which the Triton kernels run, with reasons.

jax_triton reaches into the internals of both JAX and Triton, so that few
versions of the three fit together. What was tried, by compiling a kernel for a
GPU that was not there:

| jax              | jax-triton   | triton       |                            |
|------------------|--------------|--------------|----------------------------|
| 0.11.2, 0.12.0.1 | 0.3.1        | 3.6.0        | compiles                   |
| 0.11.2, 0.12.0.1 | 0.3.1        | 3.7.1, 3.9.0 | lowers (PTX not assembled) |
| 0.11.2           | 0.4.0, 0.4.1 | 3.6.0        | TypeError in Triton        |
| 0.11.2           | 0.4.0, 0.4.1 | 3.7.1        | compiles, but an aliased   |
|                  |              |              | output has no pointer      |
| 0.11.2           | 0.4.0, 0.4.1 | 3.9.0        | PTX 9.4, too new for the   |
|                  |              |              | ptxas of CUDA 13.0         |
| 0.12.0.1         | 0.4.0, 0.4.1 | any of these | TypeError in jax_triton    |

The PTX of triton 3.6 is that of CUDA 12.8 and 12.9, which every toolkit that
JAX brings can assemble: it is the version to have.
"""

import importlib.metadata
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

# First parts of the versions of jax, jax-triton and triton.
WORKING_VERSIONS = (
  ("0.11", "0.3.1", "3.6"),
  ("0.12", "0.3.1", "3.6"),
)
MIN_COMPUTE_CAPABILITY = 80  # bfloat16
MAX_KEY_DIM = 256  # all key channels of a state are in registers

_DTYPES = ("bfloat16", "float16", "float32")
_MAX_PROGRAMS = 2**31 - 1
_MIN_TILE = 8  # value channels of a program, at the least
_REMEDY = "pip install 'gdn2-jax[triton]'"


def unsupported_reason(
  q: Any, k: Any, v: Any, g: Any, b: Any, w: Any, state: Any
) -> str | None:
  """Reason why the Triton kernels cannot run a call, or None."""
  arrays = {"q": q, "k": k, "v": v, "g": g, "b": b, "w": w, "state": state}
  return versions_reason() or device_reason() or _shapes_reason(arrays)


def versions_reason() -> str | None:
  """Names a missing package, or versions that do not fit together."""
  versions = {"jax": jax.__version__}
  for package in ("jax-triton", "triton"):
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      return f"{package} is not installed: {_REMEDY}"
  numbers = tuple(versions.values())
  if any(_starts_with(numbers, working) for working in WORKING_VERSIONS):
    return None
  known = " or ".join(map(_named, WORKING_VERSIONS))
  return f"{_named(numbers)} are not known to work together, {known} are"


def device_reason() -> str | None:
  """Reason why the default device cannot run the kernels, or None."""
  needed = "an NVIDIA GPU of compute capability 8.0 or newer"
  device = jax.config.jax_default_device
  if device is None or isinstance(device, str):
    device = jax.local_devices(backend=device)[0]
  if device.platform != "gpu":
    return f"needs {needed}, the default device is a {device.platform}"
  # "8.9" on NVIDIA's, "gfx942" on AMD's.
  number = getattr(device, "compute_capability", "")
  is_nvidia = re.fullmatch(r"(\d+)\.(\d)", number)
  if not is_nvidia or int("".join(is_nvidia.groups())) < MIN_COMPUTE_CAPABILITY:
    found = f"{device.device_kind} ({number or 'no compute capability'})"
    return f"needs {needed}, the default device is {found}"
  return None


def _shapes_reason(arrays: dict[str, Any]) -> str | None:
  for name, x in arrays.items():
    dtypes = ("float32",) if name == "state" else _DTYPES
    if jnp.dtype(x.dtype).name not in dtypes:
      return f"{name} is {jnp.dtype(x.dtype)}, not one of {', '.join(dtypes)}"
  B, H, K, V = arrays["state"].shape
  if K > MAX_KEY_DIM:
    return f"K = {K} key channels are more than {MAX_KEY_DIM}"
  if B * H * -(-V // _MIN_TILE) > _MAX_PROGRAMS:
    return f"B * H * V = {B * H * V} is more than a grid holds"
  return None


def _starts_with(numbers: Sequence[str], prefixes: Sequence[str]) -> bool:
  return all(
    f"{number}.".startswith(f"{prefix}.")
    for number, prefix in zip(numbers, prefixes, strict=True)
  )


def _named(numbers: Sequence[str]) -> str:
  jax_, jax_triton, triton = numbers
  return f"jax {jax_} with jax-triton {jax_triton} and triton {triton}"
