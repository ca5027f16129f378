"""Ops and shapes that the GPU benchmark checks and times.

Beside the recurrence: short convolution, gated norm and windowed attention, in
the shapes of the 1.3B models, four rows of 4,096 tokens.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gdn2_jax.kernels.cases import layer_step
from gdn2_jax.kernels.operands import LayerStep
from gdn2_jax.ops.attention.api import sliding_window_attention
from gdn2_jax.ops.gdn2.api import gdn2, gdn2_step
from gdn2_jax.ops.gdn2.arg_specs import ArgSpec, make_inputs
from gdn2_jax.ops.gdn2.fused_gates import as_projections, gdn2_fused_gates
from gdn2_jax.ops.layer_step import gdn2_layer_step
from gdn2_jax.ops.norm import gated_rms_norm
from gdn2_jax.ops.short_conv import short_conv

GRADIENTS = ("dq", "dk", "dv", "dg", "db", "dw", "dstate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One op on one shape; `kernels` are checked against `truth` in float32."""

  name: str  # of the shape, in the rows' labels
  op: Callable[..., Any]  # f(implementation, *inputs) -> tuple of outputs
  make: Callable[[], Any]  # f() -> (inputs, cotangents of the outputs)
  outputs: tuple[str, ...] = ("o", "state")
  gradients: tuple[str, ...] = ()  # of all inputs; () checks outputs only
  dtype: str = "bfloat16"  # of the inputs; states and decays are float32
  kernels: tuple[str, ...] = ("mosaic_gpu",)
  truth: str = "xla"

  def forward(self, implementation: str, inputs: Any, cotangents: Any) -> Any:
    """Outputs."""
    del cotangents
    return self.op(implementation, *inputs)

  def both(self, implementation: str, inputs: Any, cotangents: Any) -> Any:
    """Outputs and the gradients of all inputs."""
    op = functools.partial(self.op, implementation)
    outputs, pullback = jax.vjp(op, *inputs)
    cotangents = jax.tree.map(
      lambda d, x: d.astype(x.dtype), cotangents, tuple(outputs)
    )
    return (*outputs, *pullback(cotangents))


_BF16 = functools.partial(ArgSpec, H=16, K=128, V=128, dtype="bfloat16")
_TINY = functools.partial(
  ArgSpec, B=1, T=128, H=1, K=64, V=64, dtype="bfloat16"
)


def checked(tiny: bool) -> list[Case]:
  """Cases to check; tiny ones in a rehearsal."""
  if tiny:
    control = ArgSpec(name="xla itself", B=1, T=64, H=1, K=16, V=16)
    sequences = [_TINY(name="1x128", segments=3)]
    fused = [_TINY(name="gates 1x64", T=64)]
    batches, spec = (1,), _TINY
  else:
    control = ArgSpec(name="xla itself", B=1, T=512, H=2, K=128, V=128)
    sequences = [
      _BF16(name="8x2048", B=8, T=2048),
      _BF16(name="1x16384", B=1, T=16384),
      _BF16(name="packed", B=8, T=2048, segments=7),
      _BF16(name="g to -200", B=8, T=2048, g_min=-200.0, g_max=0.0),
      _BF16(name="slow decay", B=1, T=16384, g_min=-0.01, g_max=0.0),
      _BF16(name="grouped heads", B=8, T=2048, H=8, value_heads=2),
      _BF16(name="K=V=64", B=8, T=2048, K=64, V=64),
      _BF16(name="fp16", B=8, T=2048, dtype="float16"),
      _BF16(name="odd sizes", B=3, T=1001, H=5, K=48, V=80),
    ]
    fused = [
      _BF16(name="gates 8x2048", B=8, T=2048, segments=7),
      _BF16(name="gates 1x16384", B=1, T=16384),
    ]
    batches, spec = (1, 64, 512), _BF16
  backward = {"gradients": GRADIENTS}
  # "xla", the truth for the kernels, is itself compared with the token scan.
  reference = {"kernels": ("xla",), "truth": "reference"}
  found = [_recurrence(control, _sequence, **backward, **reference)]
  found += [_recurrence(s, _sequence, **backward) for s in sequences]
  found += [_recurrence(s, _fused_gates, **backward) for s in fused]
  for B in batches:
    one = spec(name=f"step B={B}", B=B, T=1)
    found.append(_recurrence(one, _step, kernels=("mosaic_gpu", "triton")))
  if not tiny:
    short = _BF16(name="short", B=8, T=64)
    found.append(_recurrence(short, _sequence, kernels=("triton",)))
    found.append(_layer_step_case())
  return found + _others(tiny)


def timed_recurrences(tiny: bool) -> list[tuple[str, Case]]:
  """Kinds and cases of the recurrence to time."""
  spec, batches = (_TINY, (1,)) if tiny else (_BF16, (1, 64, 512))
  sequences = [spec(name="8x2048", B=8, T=2048)]
  sequences.append(spec(name="1x16384", B=1, T=16384))
  if tiny:
    sequences = [spec(name="1x128")]
  # From a zero state, as in training.
  cases = [_recurrence(s, _sequence, state=False) for s in sequences]
  steps = [spec(name=f"B={B}", B=B, T=1) for B in batches]
  return [
    *(("forward", case) for case in cases),
    *(("forward+backward", case) for case in cases),
    *(("decode", _recurrence(s, _step)) for s in steps),
  ]


def timed(tiny: bool) -> list[tuple[str, Case]]:
  """Kinds and cases of all ops to time."""
  others = [
    (kind, case)
    for case in _others(tiny)
    for kind in ("forward", "forward+backward")
  ]
  return timed_recurrences(tiny) + others


def _recurrence(spec, op, state=True, **options):
  return Case(
    name=spec.name,
    op=functools.partial(op, spec),
    make=functools.partial(_recurrence_arrays, spec, state),
    dtype=spec.dtype,
    **options,
  )


def _recurrence_arrays(spec, with_state):
  """Inputs q k v g b w (and state), and cotangents of o and state."""
  inputs, _ = make_inputs(spec)
  shape = (spec.B, spec.H * spec.value_heads, spec.K, spec.V)
  keys = jax.random.split(jax.random.key(1), 3)
  state, dstate = (jax.random.normal(key, shape) for key in keys[:2])
  do = jax.random.normal(keys[2], inputs[2].shape).astype(spec.dtype)
  if spec.T == 1:
    inputs, do = tuple(x[:, 0] for x in inputs), do[:, 0]
  return (*inputs, state) if with_state else inputs, (do, dstate)


def _sequence(spec, implementation, q, k, v, g, b, w, state=None):
  options = {"segment_ids": _segments(spec), "implementation": implementation}
  return gdn2(q, k, v, g, b, w, state=state, **options)


def _fused_gates(spec, implementation, *inputs):
  options = {"segment_ids": _segments(spec), "implementation": implementation}
  return gdn2_fused_gates(as_projections(*inputs), state=inputs[-1], **options)


def _step(spec, implementation, *inputs):
  del spec
  return gdn2_step(*inputs, implementation=implementation)


def _layer_step_case():
  case = layer_step(jnp.dtype(jnp.bfloat16))
  return Case(
    name="layer step",
    op=_layer_step,
    make=lambda: (case.inputs, ()),
    outputs=case.names,
  )


def _layer_step(implementation, *operands):
  p = LayerStep(*operands, layer=1)
  y, cache = gdn2_layer_step(p, implementation=implementation)
  return (y, *cache.values())


def _segments(spec):
  """Segment ids: boundaries inside chunks, padding inside and at the end."""
  if spec.segments == 1:
    return None
  at = jnp.arange(spec.T)
  ids = jnp.roll(1 + at * spec.segments // spec.T, 13).at[:13].set(1)
  padding = (at % 501 < 9) | (at >= spec.T - 21)
  padding = jnp.roll(padding, 40) & (at > 40)
  ids = jnp.where(padding, 0, ids).astype(jnp.int32)
  return jnp.broadcast_to(ids, (spec.B, spec.T))


def _others(tiny):
  """Cases of gated norm, short convolution and attention."""
  B, T, H, V = (1, 64, 2, 64) if tiny else (4, 4096, 16, 128)
  heads, D = (1, 64) if tiny else (18, 128)
  wide, (taps, C) = (B, T, H, V), (4, H * V)
  length = T // 3 + 1

  def case(name, op, names, *shapes):
    y, *gradients = names.split()
    return Case(
      name=f"{name} {B}x{T}",
      op=op,
      make=functools.partial(_normal_arrays, shapes),
      outputs=(y,),
      gradients=tuple(gradients),
    )

  found = [
    case(
      "gated norm", _norm, "y dx dgate dweight dbias", wide, wide, (V,), (H, V)
    )
  ]
  convs = {"short conv packed": length}
  if not tiny:
    convs["short conv"] = None
  for name, documents in convs.items():
    op = functools.partial(_conv, documents)
    shapes = (B, T, C), (taps, C), (B, taps - 1, C)
    found.append(case(name, op, "y dx dkernel dstate", *shapes))
  op = functools.partial(_attention, length, T // 2)
  shapes = 3 * ((B, T, heads, D),)
  return [*found, case("attention packed", op, "o dq dk dv", *shapes)]


def _normal_arrays(shapes):
  """Normal bfloat16 inputs, and a cotangent in the shape of the first."""
  shapes = (*shapes, shapes[0])
  keys = jax.random.split(jax.random.key(0), len(shapes))
  *inputs, dy = (
    jax.random.normal(key, shape, jnp.float32).astype("bfloat16")
    for key, shape in zip(keys, shapes, strict=True)
  )
  return tuple(inputs), (dy,)


def _norm(implementation, x, gate, weight, bias):
  options = {"bias": bias, "implementation": implementation}
  return (gated_rms_norm(x, gate, weight, **options),)


def _conv(length, implementation, x, kernel, state):
  ids = None if length is None else _documents(length, *x.shape[:2])
  options = {"activation": "silu", "implementation": implementation}
  return short_conv(x, kernel, segment_ids=ids, state=state, **options)[:1]


def _attention(length, window, implementation, q, k, v):
  ids = _documents(length, *q.shape[:2])
  options = {"q_segment_ids": ids, "kv_segment_ids": ids}
  options |= {"window": window, "implementation": implementation}
  return (sliding_window_attention(q, k, v, **options),)


def _documents(length, B, T):
  """Segment ids of documents of equal length, padding at the end."""
  at = jnp.arange(T)
  ids = jnp.where(at < T - 5, 1 + at // length, 0)
  return jnp.broadcast_to(ids[None], (B, T))
