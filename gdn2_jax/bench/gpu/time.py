"""Forward, forward and backward, and decoding, each against the others.

All of a row run in one process, in rounds that take turns; a figure is a
median. A round enqueues enough calls that the way to the device hides behind
the work on it, and waits once.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gdn2_jax.bench.gpu import around, peers
from gdn2_jax.bench.gpu.names import COLUMNS
from gdn2_jax.bench.gpu.part import Compiler, Recorder, Row, first_line, wait
from gdn2_jax.ops.gdn2.api import gdn2, gdn2_step, unsupported_reason
from gdn2_jax.ops.gdn2.arg_specs import ArgSpec, make_inputs

OURS = COLUMNS[:2]
COPY_BYTES = 1 << 30

_BF16 = functools.partial(ArgSpec, H=16, K=128, V=128, dtype="bfloat16")
SEQUENCES = (
  _BF16(name="8x2048", B=8, T=2048),
  _BF16(name="1x16384", B=1, T=16384),
)
STEPS = tuple(_BF16(name=f"B={B}", B=B, T=1) for B in (1, 64, 512))
STEPS_IN_A_ROW = 64

_TINY = functools.partial(
  ArgSpec, B=1, T=128, H=1, K=64, V=64, dtype="bfloat16"
)
TINY_SEQUENCES = (_TINY(name="1x128"),)
TINY_STEPS = (_TINY(name="B=1", T=1),)

Call = tuple[Callable[[], Any], Callable[[Any], Any]]  # and how to wait


def run(recorder: Recorder, rehearse: bool) -> None:
  """Writes the copy's bandwidth, then a row per shape and kind."""
  rounds, seconds = (1, 0.0) if rehearse else (7, 0.02)
  compiler = Compiler(2 if rehearse else 5)
  race = functools.partial(_race, rounds=rounds, seconds=seconds)
  size = 1 << 20 if rehearse else COPY_BYTES
  jobs = []
  for kind, specs in (
    ("forward", TINY_SEQUENCES if rehearse else SEQUENCES),
    ("forward+backward", TINY_SEQUENCES if rehearse else SEQUENCES),
    ("decode", TINY_STEPS if rehearse else STEPS),
  ):
    in_a_row = 2 if rehearse else STEPS_IN_A_ROW
    for spec in specs:
      label = f"{kind} {spec.name}"
      if label not in recorder.done:
        jobs.append((label, _Job(compiler, kind, spec, in_a_row)))
  for case in around.cases(rehearse):
    for kind in ("forward", "forward+backward"):
      label = f"{kind} {case.name}"
      if label not in recorder.done:
        jobs.append((label, around.Timing(compiler, kind, case)))
  recorder.run("copy", functools.partial(_copy, size, race))
  for label, job in jobs:
    recorder.run(label, functools.partial(job.measure, recorder, race))
  compiler.close()


class _Job:
  """One row: what is compiled for it, and its measurement."""

  def __init__(
    self, compiler: Compiler, kind: str, spec: ArgSpec, in_a_row: int
  ):
    self.kind, self.spec, self.in_a_row = kind, spec, in_a_row
    self.futures, self.notes = {}, {}
    arguments = jax.eval_shape(functools.partial(_arguments, spec))
    function = {
      "forward": _forward,
      "forward+backward": _both,
      "decode": functools.partial(_steps, in_a_row),
    }[kind]
    for name in OURS:
      reason = unsupported_reason(name, *arguments[:6], step=kind == "decode")
      if reason is not None:
        self.notes[name] = f"not run: {reason}"
        continue
      call = jax.jit(functools.partial(function, name))
      self.futures[name] = compiler.submit(
        functools.partial(call.lower, *arguments)
      )

  def measure(self, recorder: Recorder, race: Callable[..., Any]) -> Row:
    """Times whatever runs; the rest has a note."""
    arguments = jax.block_until_ready(
      jax.jit(_arguments, static_argnums=0)(self.spec)
    )
    calls: dict[str, Call] = {}
    for name, future in self.futures.items():
      try:
        compiled = wait(future, recorder)
      except Exception as e:
        self.notes[name] = f"not run: {first_line(e)}"
        continue
      calls[name] = functools.partial(compiled, *arguments), _wait_for_jax
    for name in peers.LABELS:
      try:
        calls[name] = self._peer(name, arguments), _wait_for_torch
        calls[name][0]()  # compiles and tunes
        peers.synchronize()
      except Exception as e:
        calls.pop(name, None)
        self.notes[name] = f"not run: {first_line(e)}"
    seconds = race(calls)
    moved = _bytes(self.kind, arguments)
    if self.kind == "decode":  # a call of ours makes many steps
      for name in OURS:
        if name in seconds:
          seconds[name] /= self.in_a_row
    return {
      "kind": self.kind,
      "shape": self.spec.name,
      "ms": {name: 1e3 * s for name, s in seconds.items()},
      "bytes": moved,
      "gb_per_s": {name: moved / s / 1e9 for name, s in seconds.items()},
      "notes": self.notes,
    }

  def _peer(self, name, arguments):
    *inputs, state, do, _ = arguments
    if self.kind == "decode":
      return peers.step(name, tuple(inputs), state)
    backward = self.kind != "forward"
    return peers.sequence(name, tuple(inputs), do if backward else None)


def _arguments(spec):
  """q k v g b w, state, and the cotangents of o and of the state."""
  inputs, _ = make_inputs(spec)
  shape = (spec.B, spec.H * spec.value_heads, spec.K, spec.V)
  keys = jax.random.split(jax.random.key(1), 3)
  state, dstate = (jax.random.normal(key, shape) for key in keys[:2])
  do = jax.random.normal(keys[2], inputs[2].shape).astype(spec.dtype)
  if spec.T == 1:
    inputs, do = tuple(x[:, 0] for x in inputs), do[:, 0]
  return (*inputs, state, do, dstate)


def _forward(name, q, k, v, g, b, w, state, do, dstate):
  del state, do, dstate  # sequences start from zero, as in training
  return gdn2(q, k, v, g, b, w, implementation=name)


def _both(name, q, k, v, g, b, w, state, do, dstate):
  del state
  run = functools.partial(gdn2, implementation=name)
  outputs, pullback = jax.vjp(run, q, k, v, g, b, w)
  return outputs, pullback((do, dstate))


def _steps(in_a_row, name, q, k, v, g, b, w, state, do, dstate):
  del dstate

  def step(_, carry):
    return gdn2_step(q, k, v, g, b, w, carry[1], implementation=name)

  return jax.lax.fori_loop(0, in_a_row, step, (jnp.zeros_like(do), state))


def _bytes(kind, arguments):
  """What must be read and written at the least: arguments and results."""
  *inputs, state, do, dstate = (x.nbytes for x in arguments)
  if kind == "decode":
    return sum(inputs) + 2 * state + do
  forward = sum(inputs) + do + state
  if kind == "forward":
    return forward
  return forward + do + dstate + sum(inputs)


def _copy(size, race):
  """Bandwidth of copying an array on the device, bytes read and written."""
  source = jnp.ones(size // 4, jnp.float32)
  copy = jax.jit(jnp.copy).lower(source).compile()
  seconds = race({"copy": (lambda: copy(source), _wait_for_jax)})["copy"]
  return {"bytes": 2 * size, "gb_per_s": 2 * size / seconds / 1e9}


def _race(
  calls: dict[str, Call], rounds: int, seconds: float
) -> dict[str, float]:
  """Median seconds of a call, in rounds of about `seconds` that take turns."""
  if not seconds:  # a rehearsal: calls take long and their times are nothing
    return {name: _timed(call, 1) for name, call in calls.items()}
  repeats = {}
  for name, call in calls.items():
    _timed(call, 1)
    repeats[name] = max(1, min(200, round(seconds / _timed(call, 1))))
  times = {name: [] for name in calls}
  for _ in range(rounds):
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


def _wait_for_jax(result):
  jax.block_until_ready(result)


def _wait_for_torch(result):
  del result
  peers.synchronize()
