"""Comparison of kernels with "xla" before their first use on a device.

A compiler, a driver or a chip that the kernels were never run on may get them
wrong, and a wrong gradient does not stop a training run: it spoils it. So the
first time that `implementation=None` would choose a kernel it runs forward and
backward on a small case, on the device, and is passed over with a warning where
it disagrees. What passed is remembered for the process and, for this device,
these versions and these kernels, in a file of the user's cache directory.

A named implementation is not checked.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import os
import pathlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from gdn2_jax.files import write_atomically
from gdn2_jax.kernels.errors import relative_rms

# In units of the dtype's rounding: the kernels' largest error in any output of
# the case is 0.5 of them in either 16-bit dtype (4.2e-3 and 4.6e-4 relative RMS
# in the interpreter). Not an accuracy contract, which tests hold.
_BOUND_EPS = 4
_LEAST_BOUND = 1e-5  # float32 sums in another order
_RUNS = 3  # a race does not lose every time

_enabled = True
_passed: dict[str, bool] = {}


def enable(enabled: bool) -> None:
  """Turns the check off, or on again; kernels are trusted while it is off."""
  global _enabled
  _enabled = enabled


class Case(NamedTuple):
  """Small case that a kernel and its reference are both called with.

  Attributes:
    names: names of the outputs, gradients included.
    inputs: floating-point arrays; the reference gets them in float32.
    outputs_of: f(run, *inputs) -> outputs.
  """

  names: tuple[str, ...]
  inputs: tuple[Any, ...]
  outputs_of: Callable[..., Any]


def passes(
  name: str,
  run: Callable[..., Any],
  reference: Callable[..., Any],
  make_case: Callable[[Any], Case],
  dtype: Any,
  device: Any,
) -> bool:
  """True if a kernel agrees with the reference on a device, or while off.

  Safe while a function is traced. Warns, once, if it does not agree; raises
  RuntimeError then if there are other processes, which would have to fall back
  as well.
  """
  if not _enabled:
    return True
  key = _key(name, dtype, device)
  if key not in _passed:
    _passed[key] = key in _read()
    if not _passed[key]:
      problem, error = _compare(run, reference, make_case, dtype, device)
      _passed[key] = problem is None
      if problem is None:
        _remember(key, error)
      else:
        _tell(name, device, problem)
  return _passed[key]


def _tell(name, device, problem):
  message = (
    f"gdn2: {name} fails its self-check on {device.device_kind}: {problem}."
  )
  if jax.process_count() > 1:
    raise RuntimeError(
      f"{message} Other processes may have passed it, so this one cannot fall"
      " back alone; name implementation='xla'."
    )
  warnings.warn(
    f"{message} Using 'xla' in its place.", RuntimeWarning, stacklevel=5
  )


def _compare(run, reference, make_case, dtype, device):
  """Description of the disagreement or None, and the largest error."""
  # The trace and the mesh of the caller are state of its thread: another
  # thread computes outside of both.
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    try:
      errors = pool.submit(
        _errors, run, reference, make_case, dtype, device
      ).result()
    except Exception as e:  # whatever a compiler may raise
      return f"{type(e).__name__}: {str(e)[:500]}", None
  worst = max(errors, key=lambda n: (np.isnan(errors[n]), errors[n]))
  bound = max(_BOUND_EPS * float(jnp.finfo(dtype).eps), _LEAST_BOUND)
  if errors[worst] <= bound:
    return None, errors[worst]
  return (
    f"{worst} differs from 'xla' by {errors[worst]:.1e} (relative RMS,"
    f" at most {bound:.0e} is expected)"
  ), errors[worst]


def _errors(run, reference, make_case, dtype, device):
  """Relative RMS errors of a kernel on the case: {output: error}."""
  case = make_case(dtype)
  outputs_of = jax.jit(case.outputs_of, static_argnums=0)
  inputs = jax.device_put(case.inputs, device)
  exact = outputs_of(reference, *(x.astype(jnp.float32) for x in inputs))
  exact = [np.asarray(x, np.float64) for x in exact]
  errors = dict.fromkeys(case.names, 0.0)
  for _ in range(_RUNS):
    outputs = outputs_of(run, *inputs)
    for output, x, y in zip(case.names, outputs, exact, strict=True):
      error = relative_rms(np.asarray(x, np.float64), y)
      errors[output] = float(np.maximum(errors[output], error))  # NaN stays
  return errors


def _key(name, dtype, device):
  """Names what was checked: kernel, dtype, device, versions, sources."""
  return " | ".join(
    (
      name,
      jnp.dtype(dtype).name,
      device.device_kind,
      f"jax {jax.__version__}",
      f"jaxlib {jaxlib.__version__}",
      " ".join(device.client.platform_version.split()),
      f"sources {_sources()}",
    )
  )


@functools.cache
def _sources():
  """A digest of the op and its kernels: what the package's version means."""
  package, digest = pathlib.Path(__file__).parents[1], hashlib.sha256()
  for layer in ("kernels", "ops", "pallas", "triton"):
    for path in sorted((package / layer).rglob("*.py")):
      digest.update(path.name.encode() + b"\0" + path.read_bytes())
  return digest.hexdigest()[:16]


def _path():
  cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(cache) / "gdn2_jax" / "self_check.json"


def _read():
  """{key: largest error} of what has passed, as far as it can be read."""
  try:
    passed = json.loads(_path().read_text())
  except (OSError, ValueError, RuntimeError):  # RuntimeError: no home
    return {}
  return passed if isinstance(passed, dict) else {}


def _remember(key, error):
  """Adds to the file; a cache that cannot be written costs a check only."""
  with contextlib.suppress(OSError, RuntimeError):
    text = json.dumps(_read() | {key: error}, indent=1)
    write_atomically(_path(), text.encode())
