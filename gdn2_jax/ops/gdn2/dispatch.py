"""Implementations of the op, and the choice among them."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from gdn2_jax.kernels import choice
from gdn2_jax.ops.gdn2 import reference, xla_step
from gdn2_jax.ops.gdn2 import xla as gdn2_xla
from gdn2_jax.ops.segments import segment_starts

Implementation = Literal["reference", "xla", "mosaic_gpu", "triton"]

IMPLEMENTATIONS = ("reference", "xla", "mosaic_gpu", "triton")

# Kernels that implementation=None tries before "xla". The Triton kernel of a
# sequence goes token by token and has no backward pass, so it must be named.
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
  """Reason that an implementation cannot run a call, or None if it can.

  Args:
    implementation: One of IMPLEMENTATIONS.
    q: Query [B, T, H, K], or [B, H, K] for a step. For this and the other
      inputs, an array or any object with its shape and dtype.
    k: Key, shaped as q.
    v: Value, [B, T, HV, V] or [B, HV, V].
    g: Log-decay, shaped as q.
    b: Erase gate, shaped as q.
    w: Write gate, shaped as v.
    step: True for a call of gdn2_step.

  Returns:
    The end of a sentence that starts with the implementation's name, or None.
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
  """Name of the implementation that `implementation=None` runs.

  "mosaic_gpu" if it supports the call: on a GPU of compute capability 9.0, with
  16-bit inputs. (float32 inputs run "xla": tensor cores would round them to 16
  bits.) gdn2_step also tries "triton", on other NVIDIA GPUs with the package
  installed; gdn2 does not. Otherwise "xla". On first use on a device, a
  kernel's results are compared with those of "xla"
  (gdn2_jax.kernels.self_check); if they differ, it is not used.

  Args:
    *inputs: q, k, v, g, b and w of the call, or objects with their shapes and
      dtypes. Without them, the answer for inputs that every kernel supports.
    step: True for a call of gdn2_step.

  Returns:
    One of IMPLEMENTATIONS.
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
  """Checks a named implementation, or chooses one for None."""
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
  """Implementation f(q, k, v, g, b, w, state, segment_ids, scale) -> o, state.

  Value heads are folded: v, w [B, T, H, V'], state [B, H, K, V'].
  """
  return {
    "reference": reference.gdn2_reference,
    "xla": gdn2_xla.gdn2_xla,
    "mosaic_gpu": _mosaic_gpu,
    "triton": _triton,
  }[name]


def step_of(name: str) -> Callable[..., Any]:
  """Implementation of one token, f(q, k, v, g, b, w, states, layer, scale).

  Value heads are not folded: v, w [B, HV, V], states [N, B, HV, K, V] of N
  layers, of which one is updated. Returns o and the states.
  """
  return {
    "reference": functools.partial(
      _one_layer, functools.partial(run_folded, reference.gdn2_step_reference)
    ),
    "xla": functools.partial(
      _one_layer, functools.partial(run_folded, xla_step.gdn2_step_xla)
    ),
    "mosaic_gpu": functools.partial(_kernel_step, _mosaic_gpu_step),
    "triton": functools.partial(_kernel_step, _triton_step),
  }[name]


def _one_layer(run, q, k, v, g, b, w, states, layer, scale):
  """Runs one layer's step on its slice of the states."""
  state = lax.dynamic_index_in_dim(states, layer, keepdims=False)
  o, state = run(q, k, v, g, b, w, state, scale)
  return o, lax.dynamic_update_index_in_dim(states, state, layer, 0)


# Value heads that share a key head have the same keys, decays and erase gates,
# so they are computed as one head with wider values. Folding reshapes v and w
# without a copy, and no array with a key axis is repeated.
def run_folded(run, q, k, v, g, b, w, state, *rest):
  """Calls run on folded value heads; returns o and state unfolded."""
  H = q.shape[-2]
  v_HV, w_HV = fold_values(v, H), fold_values(w, H)
  o, end = run(q, k, v_HV, g, b, w_HV, fold_state(state, H), *rest)
  return o.reshape(v.shape), unfold_state(end, state.shape)


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
  """Kind of each token: 0 padding, 1 ordinary, 2 restart of the state."""
  if segment_ids is None:
    return None
  is_token = (segment_ids != 0).astype(jnp.int32)
  return is_token + segment_starts(segment_ids).astype(jnp.int32)


def _mosaic_gpu(q, k, v, g, b, w, state, segment_ids, scale):
  from gdn2_jax.pallas.gdn2.api import gdn2_mosaic_gpu

  kinds = token_kinds(segment_ids)
  return gdn2_mosaic_gpu(q, k, v, g, b, w, state, kinds, scale)


def _mosaic_gpu_step(q, k, v, g, b, w, states, layer, scale):
  from gdn2_jax.pallas.gdn2.api import gdn2_step_mosaic_gpu

  return gdn2_step_mosaic_gpu(q, k, v, g, b, w, states, layer, scale)


def _triton_reason(q, k, v, g, b, w):
  from gdn2_jax.triton import support

  # The kernels get the value heads of a key head folded into one.
  (*lead, H, K), V = q.shape, v.shape[-1] * v.shape[-2] // q.shape[-2]
  v, w = (jax.ShapeDtypeStruct((*lead, H, V), x.dtype) for x in (v, w))
  state = jax.ShapeDtypeStruct((lead[0], H, K, V), jnp.float32)
  return support.unsupported_reason(q, k, v, g, b, w, state)


@functools.partial(jax.custom_jvp, nondiff_argnums=(8,))
def _triton(q, k, v, g, b, w, state, segment_ids, scale):
  from gdn2_jax.pallas.partition import over_batch_and_heads
  from gdn2_jax.triton.gdn2 import gdn2_triton

  layouts = (*6 * ("b.h",), "bh", "b")
  run = over_batch_and_heads(gdn2_triton, layouts, ("b.h", "bh"), scale=scale)
  return run(q, k, v, g, b, w, state, segment_ids)


@_triton.defjvp
def _triton_jvp(scale, primals, tangents):
  from gdn2_jax.triton.gdn2 import NO_GRADIENT

  del scale, primals, tangents
  raise NotImplementedError(NO_GRADIENT)


def _triton_step(q, k, v, g, b, w, states, layer, scale):
  from gdn2_jax.pallas.partition import over_batch_and_heads
  from gdn2_jax.triton.gdn2 import gdn2_step_triton

  run = over_batch_and_heads(
    gdn2_step_triton, 7 * ("bh",), 2 * ("bh",), scale=scale
  )

  def step(*arrays):
    return run_folded(run, *arrays[:-1])  # without the scale: `run` has it

  return _one_layer(step, q, k, v, g, b, w, states, layer, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 9))
def _kernel_step(run, q, k, v, g, b, w, states, layer, scale):
  """Runs a step kernel; "xla" computes its gradient, which is rarely needed."""
  return run(q, k, v, g, b, w, states, layer, scale)


def _kernel_step_fwd(run, q, k, v, g, b, w, states, layer, scale):
  inputs = (q, k, v, g, b, w, states)
  return run(*inputs, layer, scale), (inputs, layer)


def _kernel_step_bwd(run, scale, residuals, cotangents):
  del run
  inputs, layer = residuals
  _, pullback = jax.vjp(lambda *x: step_of("xla")(*x, layer, scale), *inputs)
  return (*pullback(cotangents), None)


_kernel_step.defvjp(_kernel_step_fwd, _kernel_step_bwd)
