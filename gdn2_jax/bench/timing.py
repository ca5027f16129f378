"""Compilation and timing of functions: interleaved, medians, one clock."""

import functools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_LARGEST_COPY = 1 << 28  # bytes
_ONE_CORE = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def use_one_core() -> None:
  """Keeps this process and XLA on one core; call it before JAX starts.

  On one core the process's own CPU time is the time its work takes, whatever
  else the machine does. Where the system cannot pin, XLA alone is limited.
  """
  flags = os.environ.get("XLA_FLAGS", "")
  os.environ["XLA_FLAGS"] = f"{flags} {_ONE_CORE}".strip()
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def is_one_core() -> bool:
  """True on a CPU after `use_one_core`."""
  one = _ONE_CORE in os.environ.get("XLA_FLAGS", "")
  return one and jax.default_backend() == "cpu"


def clock() -> Callable[[], float]:
  """Clock in seconds: CPU time of this process on one core, else wall time."""
  return time.process_time if is_one_core() else time.perf_counter


class Compiled(NamedTuple):
  """Executable, and what it costs to make and to run."""

  call: Callable[..., Any]
  compile_s: float
  argument_bytes: int
  temp_bytes: int  # outputs not counted


def compile_function(
  function: Callable[..., Any], args: Sequence[Any], **jit_options: Any
) -> Compiled:
  """Traces, lowers and compiles a function for these arguments."""
  now = clock()
  start = now()
  call = jax.jit(function, **jit_options).lower(*args).compile()
  seconds = now() - start
  memory = call.memory_analysis()
  sizes = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  return Compiled(call, seconds, *sizes)


def mean_seconds(
  call: Callable[[], Any],
  calls: int = 1,
  wait: Callable[[Any], Any] = jax.block_until_ready,
) -> float:
  """Mean seconds of calls that are enqueued together and waited for once."""
  now = clock()
  start = now()
  for _ in range(calls):
    result = call()
  wait(result)
  return (now() - start) / calls


def warm_seconds(
  call: Callable[[], Any],
  calls: int = 1,
  wait: Callable[[Any], Any] = jax.block_until_ready,
) -> float:
  """Mean seconds after an untimed call.

  Without it a call pays for the memory that another function left behind.
  """
  mean_seconds(call, 1, wait)
  return mean_seconds(call, calls, wait)


def race(
  measurements: dict[str, Callable[[], float]], rounds: int
) -> dict[str, float]:
  """Median of each measurement, in rounds that take turns."""
  results = {name: [] for name in measurements}
  for _ in range(rounds):
    for name, measure in measurements.items():
      results[name].append(measure())
  return {name: statistics.median(x) for name, x in results.items()}


class Chain:
  """Calls that each take the state of the call before, donated or not."""

  def __init__(self, call: Callable[[Any], Any], state: Any):
    self._call = call
    self.state = state

  def seconds(self, calls: int) -> float:
    """Mean seconds of so many calls."""
    jax.block_until_ready(self.state)
    return mean_seconds(self._advance, calls)

  def _advance(self):
    self.state = self._call(self.state)
    return self.state


class Copy:
  """Copy of an array that reads and writes `moved` bytes together.

  On CPU a memcpy to memory that is already mapped, which XLA, returning a new
  buffer each time, cannot do.
  """

  def __init__(self, moved: int):
    size = min(max(moved // 2, 1), _LARGEST_COPY)
    self._scale = moved / 2 / size
    if jax.default_backend() == "cpu":
      target, source = np.ones(size, "uint8"), np.ones(size, "uint8")
      self._copy = functools.partial(np.copyto, target, source)
      self._seconds = mean_seconds
    else:
      source = jnp.ones(size, "uint8")
      self._copy = functools.partial(jax.jit(jnp.copy), source)
      self._seconds = warm_seconds

  def seconds(self, calls: int) -> float:
    """Mean seconds of a copy."""
    return self._scale * self._seconds(self._copy, calls)
