"""Timing of forward, forward and backward, and decoding, against "xla".

The calls of a row run in one process, in rounds that take turns; a figure is a
median. A round enqueues so many calls that the host's launches are hidden
behind the work of the device, and waits once.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gdn2_jax.bench.gpu import cases
from gdn2_jax.bench.gpu.names import OURS
from gdn2_jax.bench.gpu.part import Compiler, Recorder, Row, first_line, wait

_COPY_BYTES = 1 << 30
_STEPS_IN_A_ROW = 64

Call = tuple[Callable[[], Any], Callable[[Any], Any]]  # and how to wait


def run(recorder: Recorder, rehearse: bool) -> None:
  """Writes the copy's bandwidth, then a row per shape and kind."""
  compiler = Compiler(2 if rehearse else 5)
  in_a_row = 2 if rehearse else _STEPS_IN_A_ROW
  jobs = {}
  for kind, case in cases.timed(rehearse):
    label = f"{kind} {case.name}"
    if label in recorder.done:
      continue
    futures = {
      name: compiler.submit(_lower(kind, case, in_a_row, name)) for name in OURS
    }
    jobs[label] = functools.partial(
      _measure, kind, case, in_a_row, futures, recorder, rehearse
    )
  recorder.run("copy", functools.partial(_copy, rehearse))
  for label, job in jobs.items():
    recorder.run(label, job)
  compiler.close()


def _lower(
  kind: str, case: cases.Case, in_a_row: int, name: str
) -> Callable[[], Any]:
  """Lowering of the function to time."""

  def steps(name, inputs, cotangents):
    *token, state = inputs

    def step(_, carry):
      return case.op(name, *token, carry[1])

    carry = jnp.zeros_like(cotangents[0]), state
    return jax.lax.fori_loop(0, in_a_row, step, carry)

  function = {
    "forward": case.forward,
    "forward+backward": case.both,
    "decode": steps,
  }[kind]
  call = jax.jit(functools.partial(function, name))
  return lambda: call.lower(*jax.eval_shape(case.make))


def _measure(
  kind: str,
  case: cases.Case,
  in_a_row: int,
  futures: dict[str, Any],
  recorder: Recorder,
  rehearse: bool,
) -> Row:
  """Row of the implementations that run; the others have a note."""
  arguments = jax.block_until_ready(jax.jit(case.make)())
  calls, notes = {}, {}
  for name, future in futures.items():
    try:
      compiled = wait(future, recorder)
    except Exception as e:
      notes[name] = f"not run: {first_line(e)}"
      continue
    call = functools.partial(compiled, *arguments)
    calls[name] = call, jax.block_until_ready
  seconds = race(calls, rehearse)
  if kind == "decode":
    seconds = {name: s / in_a_row for name, s in seconds.items()}
  return make_row(kind, case, arguments, seconds) | {"notes": notes}


def make_row(
  kind: str, case: cases.Case, arguments: Any, seconds: dict[str, float]
) -> Row:
  """Row of times and of bandwidths: arguments and results, each once."""
  inputs, outputs = (sum(x.nbytes for x in part) for part in arguments)
  # Gradients are as large as inputs, cotangents as outputs.
  moved = (2 if kind == "forward+backward" else 1) * (inputs + outputs)
  return {
    "kind": kind,
    "shape": case.name,
    "ms": {name: 1e3 * s for name, s in seconds.items()},
    "bytes": moved,
    "gb_per_s": {name: moved / s / 1e9 for name, s in seconds.items()},
  }


def _copy(rehearse: bool) -> Row:
  """Bandwidth of copying an array on the device, bytes read and written."""
  size = 1 << 20 if rehearse else _COPY_BYTES
  source = jnp.ones(size // 4, jnp.float32)
  copy = jax.jit(jnp.copy).lower(source).compile()
  call = functools.partial(copy, source), jax.block_until_ready
  seconds = race({"copy": call}, rehearse)["copy"]
  return {"bytes": 2 * size, "gb_per_s": 2 * size / seconds / 1e9}


def race(calls: dict[str, Call], rehearse: bool) -> dict[str, float]:
  """Median seconds of a call, in rounds of about 20 ms that take turns."""
  if rehearse:  # calls take long and their times mean nothing
    return {name: _timed(call, 1) for name, call in calls.items()}
  repeats = {}
  for name, call in calls.items():
    _timed(call, 1)
    repeats[name] = max(1, min(200, round(0.02 / _timed(call, 1))))
  times = {name: [] for name in calls}
  for _ in range(7):
    for name, call in calls.items():
      _timed(call, 1)  # warms up caches and clocks after the one before
      times[name].append(_timed(call, repeats[name]))
  return {name: statistics.median(x) for name, x in times.items()}


def _timed(call, repeats):
  function, finish = call
  start = time.perf_counter()
  for _ in range(repeats):
    result = function()
  finish(result)
  return (time.perf_counter() - start) / repeats
