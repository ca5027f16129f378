"""Rows and compilation in the process of one part of the GPU benchmark.

An illegal memory access ends the CUDA context and a deadlock the process, so
every row is in the file before the next one starts.
"""

import concurrent.futures
import contextvars
import dataclasses
import json
import pathlib
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib

from gdn2_jax.bench.gpu.names import DEVICE_LOST

OUT_OF_TIME = "not run: out of time"

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recorder:
  """Runs the rows of a part and writes each to a file, before and after.

  Attributes:
    part: Name of the part.
    path: JSON lines; {"started": true} before a row, the row after it.
    deadline: On the clock of time.time; no row starts after it.
    done: Labels of rows that an earlier process finished or that ended it.
  """

  part: str
  path: pathlib.Path
  deadline: float
  done: frozenset[str] = frozenset()

  def write(self, row: Row) -> None:
    """Appends a row."""
    with self.path.open("a") as file:
      file.write(json.dumps({"part": self.part, **row}) + "\n")

  def run(self, label: str, measure: Callable[[], Row]) -> None:
    """Adds the row of `measure`, or its error; exits if the device is lost."""
    if label in self.done:
      return
    if time.time() >= self.deadline:
      self.write({"label": label, "note": OUT_OF_TIME})
      return
    self.write({"label": label, "started": True})
    try:
      row = measure()
    except (NotImplementedError, ImportError, TimeoutError) as e:
      row = {"note": f"not run: {first_line(e)}"}
    except Exception as e:  # a compiler may raise anything; the rest goes on
      row = {"note": f"failed: {first_line(e)}", "passed": False}
      if not _device_works():
        self.write({"label": label, **row})
        raise SystemExit(DEVICE_LOST) from e
    self.write({"label": label, **row})

  def remaining(self) -> float:
    """Seconds up to the deadline, at least 0."""
    return max(0.0, self.deadline - time.time())


class Compiler:
  """Compiles in threads, ahead of use; tracing and lowering take turns."""

  def __init__(self, workers: int):
    self._pool = concurrent.futures.ThreadPoolExecutor(workers)
    self._lowering = threading.Lock()

  def submit(self, lower: Callable[[], Any]) -> concurrent.futures.Future:
    """Compiles what `lower` returns; the result is the executable."""
    context = contextvars.copy_context()  # the kernels' target is in it

    def work():
      with self._lowering:
        lowered = context.run(lower)
      return lowered.compile()

    return self._pool.submit(work)

  def close(self) -> None:
    """Cancels compilations that have not begun."""
    self._pool.shutdown(wait=False, cancel_futures=True)


def wait(future: concurrent.futures.Future, recorder: Recorder) -> Any:
  """Executable of Compiler.submit; TimeoutError after the deadline."""
  try:
    return future.result(timeout=recorder.remaining())
  except concurrent.futures.TimeoutError:
    raise TimeoutError("out of time while it compiled") from None


def first_line(error: BaseException, width: int = 200) -> str:
  """First line of an exception's text, cut for a table."""
  lines = str(error).strip().splitlines() or [""]
  name = type(error).__name__
  expected = isinstance(error, (NotImplementedError, ImportError, TimeoutError))
  return (lines[0] if expected else f"{name}: {lines[0]}")[:width]


def environment() -> Row:
  """Device and versions, as JAX sees them."""
  device = jax.devices()[0]
  return {
    "platform": device.platform,
    "device": device.device_kind,
    "jax": jax.__version__,
    "jaxlib": jaxlib.__version__,
    "platform_version": " ".join(device.client.platform_version.split()),
  }


def _device_works() -> bool:
  try:
    jnp.ones(8).sum().block_until_ready()
  except Exception:
    return False
  return True
