"""Timing of forward, forward and backward, and decoding, against "xla".

The calls of a row run in one process, in rounds that take turns; a figure is a
median. A round enqueues so many calls that the host's launches are hidden
behind the work of the device, and waits once.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gdn2_jax.bench import timing
from gdn2_jax.bench.gpu import cases
from gdn2_jax.bench.gpu.names import OURS
from gdn2_jax.bench.gpu.part import Job, Program, Recorder, Row, first_line

_COPY_BYTES = 1 << 30
_STEPS_IN_A_ROW = 64
_ROUNDS = 7
_ROUND_SECONDS = 0.02


def run(recorder: Recorder, rehearse: bool) -> None:
  """Writes the copy's bandwidth, then a row per shape and kind."""
  jobs = {"copy": Job(functools.partial(_copy, rehearse))}
  for kind, case in cases.timed(rehearse):
    jobs[f"{kind} {case.name}"] = Job(
      functools.partial(_measure, kind, case, rehearse),
      [_lowering(kind, case, rehearse, name) for name in OURS],
    )
  recorder.run(jobs)


def _steps(rehearse: bool) -> int:
  """Tokens decoded by one call."""
  return 2 if rehearse else _STEPS_IN_A_ROW


def _lowering(
  kind: str, case: cases.Case, rehearse: bool, name: str
) -> Callable[[], Any]:
  """Lowering of the function to time."""

  def steps(name, inputs, cotangents):
    *token, state = inputs

    def step(_, carry):
      return case.op(name, *token, carry[1])

    carry = jnp.zeros_like(cotangents[0]), state
    return jax.lax.fori_loop(0, _steps(rehearse), step, carry)

  function = {
    "forward": case.forward,
    "forward+backward": case.both,
    "decode": steps,
  }[kind]
  call = jax.jit(functools.partial(function, name))
  return lambda: call.lower(*jax.eval_shape(case.make))


def _measure(
  kind: str, case: cases.Case, rehearse: bool, *programs: Program
) -> Row:
  """Row of the implementations that run; the others have a note."""
  arguments = jax.block_until_ready(jax.jit(case.make)())
  calls, notes = {}, {}
  for name, program in zip(OURS, programs, strict=True):
    try:
      calls[name] = functools.partial(program(), *arguments)
    except Exception as e:
      notes[name] = f"not run: {first_line(e)}"
  seconds = race(calls, rehearse)
  if kind == "decode":
    seconds = {name: s / _steps(rehearse) for name, s in seconds.items()}
  return make_row(kind, case, arguments, seconds) | {"notes": notes}


def make_row(
  kind: str, case: cases.Case, arguments: Any, seconds: dict[str, float]
) -> Row:
  """Row of times and bandwidths; arguments and results count once."""
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
  call = functools.partial(copy, source)
  seconds = race({"copy": call}, rehearse)["copy"]
  return {"bytes": 2 * size, "gb_per_s": 2 * size / seconds / 1e9}


def race(
  calls: dict[str, Callable[[], Any]],
  rehearse: bool,
  wait: Callable[[Any], Any] = jax.block_until_ready,
) -> dict[str, float]:
  """Median seconds of each call, in rounds of about 20 ms."""
  if rehearse:  # calls take long and their times mean nothing
    return {n: timing.mean_seconds(call, 1, wait) for n, call in calls.items()}
  measurements = {}
  for name, call in calls.items():
    once = timing.warm_seconds(call, 1, wait)
    repeats = max(1, min(200, round(_ROUND_SECONDS / once)))
    measurements[name] = functools.partial(
      timing.warm_seconds, call, repeats, wait
    )
  return timing.race(measurements, _ROUNDS)
