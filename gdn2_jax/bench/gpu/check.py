"""Every kernel on the real chip, against "xla" in float32.

Both get the same rounded inputs; see gpu_errors for what is compared.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from gdn2_jax.bench.gpu import around as gpu_around
from gdn2_jax.bench.gpu.errors import compare
from gdn2_jax.bench.gpu.part import Compiler, Recorder, Row, wait
from gdn2_jax.ops.gdn2.api import gdn2, gdn2_step, unsupported_reason
from gdn2_jax.ops.gdn2.arg_specs import ArgSpec, make_inputs
from gdn2_jax.ops.gdn2.fused_gates import as_projections, gdn2_fused_gates

NAMES = ("o", "state", "dq", "dk", "dv", "dg", "db", "dw", "dstate")

_BF16 = functools.partial(ArgSpec, H=16, K=128, V=128, dtype="bfloat16")
SEQUENCES = (
  _BF16(name="8x2048", B=8, T=2048),
  _BF16(name="1x16384", B=1, T=16384),
  _BF16(name="packed", B=8, T=2048, segments=7),
  _BF16(name="g to -200", B=8, T=2048, g_min=-200.0, g_max=0.0),
  _BF16(name="slow decay", B=1, T=16384, g_min=-0.01, g_max=0.0),
  _BF16(name="grouped heads", B=8, T=2048, H=8, value_heads=2),
  _BF16(name="K=V=64", B=8, T=2048, K=64, V=64),
  _BF16(name="fp16", B=8, T=2048, dtype="float16"),
  _BF16(name="odd sizes", B=3, T=1001, H=5, K=48, V=80),
  _BF16(name="gates 8x2048", B=8, T=2048, segments=7),
  _BF16(name="gates 1x16384", B=1, T=16384),
)
STEPS = tuple(_BF16(name=f"step B={B}", B=B, T=1) for B in (1, 64, 512))
SHORT = _BF16(name="short", B=8, T=64)
# "xla", which the kernels are held to, is itself held to the token scan.
CONTROL = ArgSpec(name="xla itself", B=1, T=512, H=2, K=128, V=128)

_TINY = functools.partial(
  ArgSpec, B=1, T=128, H=1, K=64, V=64, dtype="bfloat16"
)
TINY_SEQUENCES = (
  _TINY(name="1x128", segments=3),
  _TINY(name="gates 1x64", T=64),
)
TINY_STEPS = (_TINY(name="step B=1", T=1),)
TINY_CONTROL = ArgSpec(name="xla itself", B=1, T=64, H=1, K=16, V=16)


def run(recorder: Recorder, rehearse: bool) -> None:
  """Writes a row for every kernel and shape."""
  compiler = Compiler(2 if rehearse else 5)
  jobs = []
  control = TINY_CONTROL if rehearse else CONTROL
  jobs.append(("xla", control, "reference", NAMES))
  for spec in TINY_SEQUENCES if rehearse else SEQUENCES:
    jobs.append(("mosaic_gpu", spec, "xla", NAMES))
  for spec in TINY_STEPS if rehearse else STEPS:
    for name in ("mosaic_gpu", "triton"):
      jobs.append((name, spec, "xla", NAMES[:2]))
  if not rehearse:
    jobs.append(("triton", SHORT, "xla", NAMES[:2]))
  pending = []
  for name, spec, truth, outputs in jobs:
    label = f"{spec.name}, {name}"
    if label not in recorder.done:
      pending.append((label, submit(compiler, name, spec, truth, outputs)))
  around = [
    gpu_around.Check(compiler, case)
    for case in gpu_around.cases(rehearse)
    if case.label not in recorder.done
  ]
  for label, job in pending:
    recorder.run(label, functools.partial(finish, job, recorder))
  for check in around:
    recorder.run(check.case.label, functools.partial(check.finish, recorder))
  compiler.close()


def submit(
  compiler: Compiler,
  name: str,
  spec: ArgSpec,
  truth: str,
  outputs: tuple[str, ...],
) -> dict[str, Any]:
  """Starts to compile a kernel and what it is compared with."""
  step = spec.name.startswith("step")
  gates = spec.name.startswith("gates")
  arguments = jax.eval_shape(functools.partial(make_arguments, spec))
  job = {"spec": spec, "outputs": outputs}
  reason = unsupported_reason(name, *arguments[0][:6], step=step)
  if reason is not None:
    return job | {"reason": reason}

  def lower(implementation, exact):
    function = _function(implementation, len(outputs) > 2, step, gates, exact)
    return jax.jit(function).lower(*arguments)

  job["actual"] = compiler.submit(lambda: lower(name, False))
  job["exact"] = compiler.submit(lambda: lower(truth, True))
  return job


def finish(job: dict[str, Any], recorder: Recorder) -> Row:
  """Runs both and compares them.

  Raises:
    NotImplementedError: the kernel cannot run the shape here.
  """
  if "reason" in job:
    raise NotImplementedError(job["reason"])
  spec: ArgSpec = job["spec"]
  arguments = make_arguments(spec)
  exact = wait(job["exact"], recorder)(*arguments)
  actual = wait(job["actual"], recorder)(*arguments)
  return compare(job["outputs"], actual, exact, spec.dtype)


def make_arguments(spec: ArgSpec) -> tuple[Any, Any, Any]:
  """(q k v g b w state), segment_ids or None, cotangents of o and state."""
  inputs, segment_ids = make_inputs(spec)
  HV = spec.H * spec.value_heads
  keys = jax.random.split(jax.random.key(1), 3)
  state_shape = (spec.B, HV, spec.K, spec.V)
  state, dstate = (jax.random.normal(key, state_shape) for key in keys[:2])
  do = jax.random.normal(keys[2], inputs[2].shape).astype(spec.dtype)
  if segment_ids is not None:
    # Boundaries off those of chunks, padding inside and at the end.
    positions = jnp.arange(spec.T)
    padding = (positions % 501 < 9) | (positions >= spec.T - 21)
    padding = jnp.roll(padding, 40) & (positions > 40)
    segment_ids = jnp.roll(segment_ids, 13, axis=1).at[:, :13].set(1)
    segment_ids = jnp.where(padding[None], 0, segment_ids)
  if spec.name.startswith("step"):
    inputs = tuple(x[:, 0] for x in inputs)
    do = do[:, 0]
  return (*inputs, state), segment_ids, (do, dstate)


def _function(implementation, gradients, step, gates, exact):
  """(inputs, segment_ids, cotangents) -> outputs and their gradients."""

  def op(segment_ids, *inputs):
    *inputs, state = inputs
    if step:
      return gdn2_step(*inputs, state, implementation=implementation)
    if gates:
      return gdn2_fused_gates(
        as_projections(*inputs, state),
        state=state,
        segment_ids=segment_ids,
        implementation=implementation,
      )
    return gdn2(
      *inputs,
      state=state,
      segment_ids=segment_ids,
      implementation=implementation,
    )

  def function(inputs, segment_ids, cotangents):
    if exact:
      inputs = tuple(x.astype(jnp.float32) for x in inputs)
    call = functools.partial(op, segment_ids)
    if not gradients:
      return call(*inputs)
    outputs, pullback = jax.vjp(call, *inputs)
    do, dstate = cotangents
    return (*outputs, *pullback((do.astype(outputs[0].dtype), dstate)))

  return function
