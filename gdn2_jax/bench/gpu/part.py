"""Rows and compilation in the process of one part.

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
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib

from gdn2_jax.bench.gpu.names import DEVICE_LOST

OUT_OF_TIME = "not run: out of time"
# Exceptions that say why a row cannot run; others are failures.
_REASONS = (NotImplementedError, ImportError, TimeoutError)

Row = dict[str, Any]
Program = Callable[[], Any]  # waits for an executable; may raise anything


class Job(NamedTuple):
  """Measurement of a row, and lowerings of the programs it is called with."""

  measure: Callable[..., Row]
  lowerings: Sequence[Callable[[], Any]] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recorder:
  """Runs the rows of a part and writes each to a file."""

  part: str
  path: pathlib.Path  # JSON lines: {"started": true} before a row, then the row
  deadline: float  # on the clock of time.time; no row starts after it
  done: frozenset[str] = frozenset()  # labels that an earlier process ended at
  workers: int = 5  # threads that compile

  def write(self, row: Row) -> None:
    """Appends a row."""
    with self.path.open("a") as file:
      file.write(json.dumps({"part": self.part, **row}) + "\n")

  def run(self, jobs: dict[str, Job]) -> None:
    """Adds a row per label; exits if the device is lost.

    Programs are compiled in threads, ahead; tracing and lowering take turns.
    """
    pool = concurrent.futures.ThreadPoolExecutor(self.workers)
    lowering, context = threading.Lock(), contextvars.copy_context()
    submitted = {}

    def compile_program(lower):
      with lowering:  # the kernels' target is in the context
        lowered = context.run(lower)
      return lowered.compile()

    def submit(lower):  # once, where jobs share a lowering
      if lower not in submitted:
        submitted[lower] = pool.submit(compile_program, lower)
      return lambda: self._wait(submitted[lower])

    ready = {
      label: (job.measure, [submit(lower) for lower in job.lowerings])
      for label, job in jobs.items()
      if label not in self.done
    }
    for label, (measure, programs) in ready.items():
      self._run(label, measure, programs)
    pool.shutdown(wait=False, cancel_futures=True)

  def remaining(self) -> float:
    """Seconds up to the deadline, at least 0."""
    return max(0.0, self.deadline - time.time())

  def _wait(self, future):
    try:
      return future.result(timeout=self.remaining())
    except concurrent.futures.TimeoutError:
      raise TimeoutError("out of time while it compiled") from None

  def _run(self, label, measure, programs):
    if time.time() >= self.deadline:
      self.write({"label": label, "note": OUT_OF_TIME})
      return
    self.write({"label": label, "started": True})
    try:
      row = measure(*programs)
    except _REASONS as e:
      row = {"note": f"not run: {first_line(e)}"}
    except Exception as e:  # a compiler may raise anything; the rest goes on
      row = {"note": f"failed: {first_line(e)}", "passed": False}
      if not _device_works():
        self.write({"label": label, **row})
        raise SystemExit(DEVICE_LOST) from e
    self.write({"label": label, **row})


def first_line(error: BaseException, width: int = 200) -> str:
  """First line of an exception's text, cut for a table."""
  lines = str(error).strip().splitlines() or [""]
  name = "" if isinstance(error, _REASONS) else f"{type(error).__name__}: "
  return f"{name}{lines[0]}"[:width]


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
