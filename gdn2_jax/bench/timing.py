"""Compilation and timing of functions: interleaved, medians, one clock."""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
  """A compiled function with what its compilation cost.

  Attributes:
    call: The executable.
    compile_s: Seconds of tracing, lowering and compiling.
    temp_bytes: Temporaries of one execution, outputs not counted.
  """

  call: Callable[..., Any]
  compile_s: float
  temp_bytes: int


_LARGEST_COPY = 1 << 28  # bytes
_ONE_CORE = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def use_one_core() -> None:
  """Keeps this process, and XLA on CPU, on one core; before JAX starts.

  On one core the process's own CPU time is the time its work takes, whatever
  else the machine does. Where the system cannot pin, XLA alone is limited.
  """
  flags = os.environ.get("XLA_FLAGS", "")
  os.environ["XLA_FLAGS"] = f"{flags} {_ONE_CORE}".strip()
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def is_one_core() -> bool:
  """Whether `use_one_core` holds, on a CPU."""
  one = _ONE_CORE in os.environ.get("XLA_FLAGS", "")
  return one and jax.default_backend() == "cpu"


def clock() -> Callable[[], float]:
  """Seconds: of this process where it has one core, else of the wall."""
  return time.process_time if is_one_core() else time.perf_counter


def compile_function(
  function: Callable[..., Any], args: Sequence[Any], **jit_options: Any
) -> Compiled:
  """Compiles a function for these arguments."""
  now = clock()
  start = now()
  call = jax.jit(function, **jit_options).lower(*args).compile()
  seconds = now() - start
  memory = call.memory_analysis()
  return Compiled(
    call=call, compile_s=seconds, temp_bytes=memory.temp_size_in_bytes
  )


def race(
  functions: dict[str, Compiled], args: Sequence[Any], rounds: int
) -> dict[str, float]:
  """Median seconds of each function, in rounds that take turns.

  Every timed call follows an untimed one of the same function, so that none
  pays for the memory that another one left behind.
  """
  now = clock()
  times = {name: [] for name in functions}
  for _ in range(rounds):
    for name, function in functions.items():
      jax.block_until_ready(function.call(*args))
      start = now()
      jax.block_until_ready(function.call(*args))
      times[name].append(now() - start)
  return {name: statistics.median(x) for name, x in times.items()}


class Copy:
  """Copy of an array, with as many bytes read and written as `moved`.

  On CPU a memcpy to memory that is already mapped, which XLA, returning a new
  buffer each time, cannot do.
  """

  def __init__(self, moved: int):
    size = min(max(moved // 2, 1), _LARGEST_COPY)
    self._scale = moved / 2 / size
    self._on_cpu = jax.default_backend() == "cpu"
    ones = np.ones if self._on_cpu else jnp.ones
    self._source = ones(size, "uint8")
    self._target = np.ones_like(self._source) if self._on_cpu else None
    self._jitted = jax.jit(jnp.copy)

  def seconds(self, calls: int) -> float:
    """Mean seconds of a copy."""
    now = clock()
    if not self._on_cpu:
      jax.block_until_ready(self._jitted(self._source))
    start = now()
    for _ in range(calls):
      if self._on_cpu:
        np.copyto(self._target, self._source)
      else:
        self._target = self._jitted(self._source)
    jax.block_until_ready(self._target)
    return self._scale * (now() - start) / calls
