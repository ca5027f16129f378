"""Choice of the op's implementation for a call, and how each is called."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from gdn2_jax.kernels import choice
from gdn2_jax.ops.gdn2 import reference, xla_step
from gdn2_jax.ops.gdn2 import xla as gdn2_xla
from gdn2_jax.ops.segments import segment_starts

Implementation = Literal["reference", "xla", "mosaic_gpu", "triton"]

IMPLEMENTATIONS = ("reference", "xla", "mosaic_gpu", "triton")

# Kernels that None tries before "xla". The Triton kernel of a sequence
# goes token by token and has no backward pass: it must be named.
_SEQUENCE_KERNELS = ("mosaic_gpu",)
_STEP_KERNELS = ("mosaic_gpu", "triton")


def unsupported_reason(
  implementation: Implementation,
  q: Any,
  k: Any,
  v: Any,
  g: Any,
  b: Any,
  w: Any,
  *,
  step: bool = False,
) -> str | None:
  """Why an implementation cannot run a call, or None if it can.

  Args:
    implementation: Its name.
    q: Query of the call, or anything with its shape and dtype, as the others:
      [B, T, H, K], or [B, H, K] for a step.
    k: Key.
    v: Value, [B, T, HV, V] or [B, HV, V].
    g: Log-decay.
    b: Erase gate.
    w: Write gate.
    step: Whether the call is gdn2_step.

  Returns:
    The reason, to be read after the implementation's name.
  """
  if implementation in ("reference", "xla"):
    return None
  if implementation == "triton":
    return _triton_reason(q, k, v, g, b, w)
  reason = choice.hopper_reason(q)
  if reason is not None:
    return reason
  K, H = q.shape[-1], q.shape[-2]
  if step:
    from gdn2_jax.pallas.gdn2.step import step_unsupported_reason

    dtypes = [x.dtype for x in (q, k, v, g, b, w)]
    return step_unsupported_reason(K, v.shape[-1], *dtypes)
  from gdn2_jax.pallas.gdn2 import api as gdn2_mosaic_gpu

  V = v.shape[-1] * v.shape[-2] // H
  dtypes = [x.dtype for x in (q, k, v, b, w)]
  if jnp.dtype(g.dtype) == jnp.float64:
    return "g is float64; the kernels take it in float32"
  return gdn2_mosaic_gpu.unsupported_reason(K, V, *dtypes)


def select_implementation(*inputs: Any, step: bool = False) -> str:
  """The name that `implementation=None` runs.

  mosaic_gpu where it can run the call: on a GPU of compute capability 9.0, for
  16-bit inputs (float32 ones are "xla": tensor cores multiply 16-bit operands,
  which is not what a caller who passes float32 asks for). gdn2_step also takes
  "triton", on other NVIDIA GPUs where its package works; gdn2 never does so by
  itself. Else "xla". On first use on a device, kernels are compared with "xla"
  (gdn2_jax.kernels.self_check) and passed over if they are wrong there.

  Args:
    *inputs: q, k, v, g, b and w of the call, or anything with their shapes and
      dtypes. Without them the answer is that for a call that any kernel takes.
    step: Whether the call is gdn2_step.

  Returns:
    The name.
  """
  if not inputs:
    head = (1, 1, 128) if step else (1, 1, 1, 128)
    inputs = 6 * (jax.ShapeDtypeStruct(head, jnp.bfloat16),)
  for name in _STEP_KERNELS if step else _SEQUENCE_KERNELS:
    if unsupported_reason(name, *inputs, step=step) is not None:
      continue
    if _is_right(name, step, inputs[0]):
      return name
  return "xla"


def resolve(implementation: str | None, *inputs: Any, step: bool) -> str:
  """The name that runs a call of q, k, v, g, b and w.

  Raises:
    ValueError: there is no such implementation.
    NotImplementedError: it cannot run this call.
  """
  if implementation is None:
    return select_implementation(*inputs, step=step)
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"gdn2: implementation: got {implementation!r}, expected None or one of"
      f" {', '.join(IMPLEMENTATIONS)}"
    )
  reason = unsupported_reason(implementation, *inputs, step=step)
  if reason is not None:
    op = "gdn2_step" if step else "gdn2"
    raise NotImplementedError(f"{op}: {implementation}: {reason}")
  return implementation


def sequence_of(name: str) -> Callable[..., Any]:
  """f(q, k, v, g, b, w, state, segment_ids, scale) -> (o, state).

  Value heads are folded: v, w [B, T, H, V'], state [B, H, K, V'].
  """
  return {
    "reference": reference.gdn2_reference,
    "xla": gdn2_xla.gdn2_xla,
    "mosaic_gpu": _mosaic_gpu,
    "triton": _triton,
  }[name]


def run_sequence(name, inputs, state, segment_ids, scale):
  """The op by that implementation, value heads as the caller has them."""
  q, k, v, g, b, w = inputs
  H, run = q.shape[2], sequence_of(name)
  v_HV, w_HV = fold_values(v, H), fold_values(w, H)
  start = fold_state(state, H)
  o, end = run(q, k, v_HV, g, b, w_HV, start, segment_ids, scale)
  return o.reshape(v.shape), unfold_state(end, state.shape)


def step_of(name: str) -> Callable[..., Any]:
  """f(q, k, v, g, b, w, state, scale) -> (o, state).

  Value heads are as the caller has them: v, w [B, HV, V], state [B, HV, K, V].
  """
  return {
    "reference": functools.partial(_folded_step, reference.gdn2_step_reference),
    "xla": functools.partial(_folded_step, xla_step.gdn2_step_xla),
    "mosaic_gpu": functools.partial(_kernel_step, _mosaic_gpu_step),
    "triton": functools.partial(_kernel_step, _triton_step),
  }[name]


# The value heads that share a key head see the same keys, decays and erases:
# they are one head with wider values. Folding them is a free reshape of v and
# w, and nothing with a key axis is ever repeated.
def fold_values(x: jax.Array, H: int) -> jax.Array:
  """[..., HV, V] as [..., H, HV // H * V]."""
  return x.reshape(*x.shape[:-2], H, -1)


def fold_state(state: jax.Array, H: int) -> jax.Array:
  """[B, HV, K, V] as [B, H, K, HV // H * V]."""
  B, HV, K, V = state.shape
  if HV == H:
    return state
  state = state.reshape(B, H, HV // H, K, V)
  return jnp.moveaxis(state, 2, 3).reshape(B, H, K, -1)


def unfold_state(state: jax.Array, shape: tuple[Any, ...]) -> jax.Array:
  """Inverse of fold_state, for a state of `shape`."""
  B, HV, K, V = shape
  H = state.shape[1]
  if HV == H:
    return state
  state = state.reshape(B, H, K, HV // H, V)
  return jnp.moveaxis(state, 3, 2).reshape(shape)


def _is_right(name, step, q):
  callables, case = sequence_of, "sequence"
  if step:
    callables, case = step_of, "step"
  return choice.is_right_here(
    f"{name} step" if step else name,
    callables(name),
    callables("xla"),
    case,
    q,
  )


def token_kinds(segment_ids):
  """0 padding, 1 a token, 2 a token that the state restarts at."""
  if segment_ids is None:
    return None
  is_token = (segment_ids != 0).astype(jnp.int32)
  return is_token + segment_starts(segment_ids).astype(jnp.int32)


def _mosaic_gpu(q, k, v, g, b, w, state, segment_ids, scale):
  from gdn2_jax.pallas.gdn2.api import gdn2_mosaic_gpu

  kinds = token_kinds(segment_ids)
  return gdn2_mosaic_gpu(q, k, v, g, b, w, state, kinds, scale)


def _mosaic_gpu_step(q, k, v, g, b, w, state, scale):
  from gdn2_jax.pallas.gdn2.api import gdn2_step_mosaic_gpu

  return gdn2_step_mosaic_gpu(q, k, v, g, b, w, state, scale)


def _triton_reason(q, k, v, g, b, w):
  from gdn2_jax.triton import support

  # The kernels see the value heads of a key head as one wide head.
  (*lead, H, K), V = q.shape, v.shape[-1] * v.shape[-2] // q.shape[-2]
  v, w = (jax.ShapeDtypeStruct((*lead, H, V), x.dtype) for x in (v, w))
  state = jax.ShapeDtypeStruct((lead[0], H, K, V), jnp.float32)
  return support.unsupported_reason(q, k, v, g, b, w, state)


@functools.partial(jax.custom_jvp, nondiff_argnums=(8,))
def _triton(q, k, v, g, b, w, state, segment_ids, scale):
  from gdn2_jax.pallas.partition import over_batch_and_heads

  operands, layouts = [q, k, v, g, b, w, state], [*(6 * ["b.h"]), "bh"]
  if segment_ids is not None:
    operands.append(segment_ids)
    layouts.append("b")
  run = over_batch_and_heads(
    _triton_local, tuple(layouts), ("b.h", "bh"), scale=scale
  )
  return run(*operands)


@_triton.defjvp
def _triton_jvp(scale, primals, tangents):
  from gdn2_jax.triton.gdn2 import NO_GRADIENT

  del scale, primals, tangents
  raise NotImplementedError(NO_GRADIENT)


def _triton_local(q, k, v, g, b, w, state, segment_ids=None, *, scale):
  from gdn2_jax.triton.gdn2 import gdn2_triton

  return gdn2_triton(q, k, v, g, b, w, state, segment_ids, scale)


def _triton_step(q, k, v, g, b, w, state, scale):
  from gdn2_jax.pallas.partition import over_batch_and_heads

  run = over_batch_and_heads(
    _triton_step_local, 7 * ("bh",), 2 * ("bh",), scale=scale
  )

  def folded(*args):
    return run(*args[:-1])  # all but the scale

  return _folded_step(folded, q, k, v, g, b, w, state, scale)


def _triton_step_local(q, k, v, g, b, w, state, *, scale):
  from gdn2_jax.triton.gdn2 import gdn2_step_triton

  return gdn2_step_triton(q, k, v, g, b, w, state, scale)


def _folded_step(run, q, k, v, g, b, w, state, scale):
  H = q.shape[1]
  v_HV, w_HV = fold_values(v, H), fold_values(w, H)
  o, new = run(q, k, v_HV, g, b, w_HV, fold_state(state, H), scale)
  return o.reshape(v.shape), unfold_state(new, state.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 8))
def _kernel_step(run, q, k, v, g, b, w, state, scale):
  """A step by a kernel, its gradient by XLA: nobody trains step by step."""
  return run(q, k, v, g, b, w, state, scale)


def _kernel_step_fwd(run, q, k, v, g, b, w, state, scale):
  inputs = (q, k, v, g, b, w, state)
  return run(*inputs, scale), inputs


def _kernel_step_bwd(run, scale, inputs, cotangents):
  del run
  xla = functools.partial(_folded_step, xla_step.gdn2_step_xla)
  _, pullback = jax.vjp(lambda *inputs: xla(*inputs, scale), *inputs)
  return pullback(cotangents)


_kernel_step.defvjp(_kernel_step_fwd, _kernel_step_bwd)
