"""Short convolution, gated norm and windowed attention on the real chip.

Checked and timed as the recurrence is, forward and with gradients. Shapes are
those of the 1.3B models, four rows of 4,096 tokens.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gdn2_jax.bench.gpu.errors import compare
from gdn2_jax.bench.gpu.names import COLUMNS
from gdn2_jax.bench.gpu.part import Compiler, Recorder, Row, first_line, wait
from gdn2_jax.ops.attention.api import sliding_window_attention
from gdn2_jax.ops.norm import gated_rms_norm
from gdn2_jax.ops.short_conv import short_conv

OURS = COLUMNS[:2]
KERNEL = OURS[0]


class Case(NamedTuple):
  """One op and shape.

  Attributes:
    name: shown in the tables.
    op: f(implementation, *inputs) -> y.
    names: of y and of the gradients of the inputs.
    shapes: of the inputs; the first is also that of y.
    dtype: of inputs and y.
  """

  name: str
  op: Callable[..., Any]
  names: tuple[str, ...]
  shapes: tuple[tuple[int, ...], ...]
  dtype: str = "bfloat16"

  @property
  def label(self) -> str:
    """Of its row among the checks."""
    return f"{self.name}, {KERNEL}"

  def inputs(self) -> list[Any]:
    """The inputs and the cotangent of y."""
    shapes = (*self.shapes, self.shapes[0])
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [
      jax.random.normal(key, shape, jnp.float32).astype(self.dtype)
      for key, shape in zip(keys, shapes, strict=True)
    ]

  def with_gradients(self, implementation: str, *inputs: Any) -> tuple:
    """y and the gradients; the last input is the cotangent."""
    *inputs, dy = inputs
    op = functools.partial(self.op, implementation)
    y, pullback = jax.vjp(op, *inputs)
    return (y, *pullback(dy.astype(y.dtype)))


def cases(tiny: bool) -> list[Case]:
  """All cases, or those of a rehearsal."""
  B, T, H, V = (1, 64, 2, 64) if tiny else (4, 4096, 16, 128)
  lengths = {"short conv packed": T // 3 + 1}
  if not tiny:
    lengths["short conv"] = None
  wide, (taps, C) = (B, T, H, V), (4, H * V)
  found = [
    Case(
      f"gated norm {B}x{T}",
      _norm,
      ("y", "dx", "dgate", "dweight", "dbias"),
      (wide, wide, (V,), (H, V)),
    )
  ]
  for name, length in lengths.items():
    found.append(
      Case(
        f"{name} {B}x{T}",
        functools.partial(_conv, length),
        ("y", "dx", "dkernel", "dstate"),
        ((B, T, C), (taps, C), (B, taps - 1, C)),
      )
    )
  D = 64 if tiny else 128
  heads = 1 if tiny else 18
  found.append(
    Case(
      f"attention packed {B}x{T}",
      functools.partial(_attention, T // 3 + 1, T // 2),
      ("o", "dq", "dk", "dv"),
      3 * ((B, T, heads, D),),
    )
  )
  return found


def _documents(length, B, T):
  """Ids of documents of that length, padding at the end."""
  at = jnp.arange(T)
  ids = jnp.where(at < T - 5, 1 + at // length, 0)
  return jnp.broadcast_to(ids[None], (B, T))


def _attention(length, window, implementation, q, k, v):
  ids = _documents(length, *q.shape[:2])
  return sliding_window_attention(
    q,
    k,
    v,
    window=window,
    q_segment_ids=ids,
    kv_segment_ids=ids,
    implementation=implementation,
  )


def _norm(implementation, x, gate, weight, bias):
  return gated_rms_norm(
    x, gate, weight, bias=bias, implementation=implementation
  )


def _conv(length, implementation, x, kernel, state):
  ids = None
  if length is not None:
    ids = _documents(length, *x.shape[:2])
  options = {"activation": "silu", "implementation": implementation}
  return short_conv(x, kernel, segment_ids=ids, state=state, **options)[0]


class Check:
  """One row of errors: compiled at once, run later."""

  def __init__(self, compiler: Compiler, case: Case):
    self.case = case
    shapes = jax.eval_shape(case.inputs)

    def lower(implementation, exact):
      def run(*inputs):
        if exact:
          inputs = [x.astype(jnp.float32) for x in inputs]
        return case.with_gradients(implementation, *inputs)

      return jax.jit(run).lower(*shapes)

    self._actual = compiler.submit(lambda: lower(KERNEL, False))
    self._exact = compiler.submit(lambda: lower("xla", True))

  def finish(self, recorder: Recorder) -> Row:
    """Runs both and compares them."""
    inputs = self.case.inputs()
    exact = wait(self._exact, recorder)(*inputs)
    actual = wait(self._actual, recorder)(*inputs)
    return compare(self.case.names, actual, exact, self.case.dtype)


class Timing:
  """One row of times: compiled at once, measured later."""

  def __init__(self, compiler: Compiler, kind: str, case: Case):
    self.kind, self.case = kind, case
    shapes = jax.eval_shape(case.inputs)
    function = case.with_gradients
    if kind == "forward":

      def function(implementation, *inputs):
        return case.op(implementation, *inputs[:-1])

    self._futures = {}
    for name in OURS:
      call = jax.jit(functools.partial(function, name))
      self._futures[name] = compiler.submit(
        functools.partial(call.lower, *shapes)
      )

  def measure(self, recorder: Recorder, race: Callable[..., Any]) -> Row:
    """Times both."""
    inputs = jax.block_until_ready(self.case.inputs())
    calls, notes = {}, {}
    for name, future in self._futures.items():
      try:
        compiled = wait(future, recorder)
      except Exception as e:
        notes[name] = f"not run: {first_line(e)}"
        continue
      call = functools.partial(compiled, *inputs)
      calls[name] = call, jax.block_until_ready
    seconds = race(calls)
    # y is as large as x, and gradients are as large as inputs.
    *sizes, dy = (x.nbytes for x in inputs)
    moved = sum(sizes) + dy
    if self.kind != "forward":
      moved += 2 * sum(sizes) + dy
    return {
      "kind": self.kind,
      "shape": self.case.name,
      "ms": {name: 1e3 * s for name, s in seconds.items()},
      "bytes": moved,
      "gb_per_s": {name: moved / s / 1e9 for name, s in seconds.items()},
      "notes": notes,
    }
