"""The public op: Gated DeltaNet-2 over a sequence, and over one token.

Equivalent, for every batch row and head, to (Eq. 10)

  S = exp(g_t)[:, None] * S
  S = S + outer(k_t, w_t * v_t - S.T @ (b_t * k_t))
  o_t = scale * S.T @ q_t

This file validates; gdn2_dispatch.py chooses an implementation. The mathematics
is in gdn2_reference.py (tokens) and gdn2_xla.py (chunks).
"""

import math
import numbers
from typing import no_type_check

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from gdn2_jax.ops import gdn2_dispatch
from gdn2_jax.ops.gdn2_dispatch import (
  IMPLEMENTATIONS,
  Implementation,
  select_implementation,
  unsupported_reason,
)

__all__ = [
  "IMPLEMENTATIONS",
  "Implementation",
  "gdn2",
  "gdn2_step",
  "select_implementation",
  "unsupported_reason",
]

MIN_HEAD_DIM = 16
MAX_HEAD_DIM = 256
_FLOATS = ("bfloat16", "float16", "float32", "float64")


# The annotations are for the reader: a wrong shape must reach _check_inputs,
# which names the argument, and not a type checker.
@no_type_check
def gdn2(
  q: Float[Array, "B T H K"],
  k: Float[Array, "B T H K"],
  v: Float[Array, "B T HV V"],
  g: Float[Array, "B T H K"],
  b: Float[Array, "B T H K"],
  w: Float[Array, "B T HV V"],
  *,
  scale: float | None = None,
  state: Float[Array, "B HV K V"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T HV V"], Float[Array, "B HV K V"]]:
  """Gated DeltaNet-2 (Eq. 10) over a sequence.

  Value head j reads key head j // (HV // H). All arithmetic is float32
  (float64 where an input is float64).

  Args:
    q: Queries [B, T, H, K], bfloat16, float16, float32 or float64.
    k: Keys [B, T, H, K].
    v: Values [B, T, HV, V], HV a multiple of H.
    g: Log-decay [B, T, H, K], <= 0, taken in float32. A positive entry raises
      where values can be seen; under jit it is outside the contract.
    b: Erase gate [B, T, H, K], in [0, 1], or [0, 2] for negative eigenvalues.
    w: Write gate [B, T, HV, V], in [0, 1].
    scale: Factor on the output; None is K**-0.5.
    state: Incoming state [B, HV, K, V], float32; None is zeros.
    segment_ids: [B, T] integers. The state restarts from zero where the id
      changes; 0 is padding, which neither reads nor changes the state and
      whose output is 0. The first segment continues `state`.
    implementation: "reference" (token by token), "xla" (chunkwise, on any
      device), "mosaic_gpu" (kernels for an NVIDIA GPU of compute capability
      9.0) or "triton" (forward of a short sequence on other NVIDIA GPUs); a
      named one runs or raises, unsupported_reason says why. None lets
      select_implementation choose.

  Returns:
    o [B, T, HV, V] in the dtype of v, and the final state [B, HV, K, V].

  Raises:
    ValueError: naming the argument whose shape, dtype or value is wrong.
    NotImplementedError: the named implementation cannot run this call.
  """
  q, k, v, g, b, w = _check_inputs(q, k, v, g, b, w, time_axis=True)
  name = gdn2_dispatch.resolve(implementation, q, k, v, g, b, w, step=False)
  scale = _check_scale(scale, q.shape[-1])
  compute_dtype = _compute_dtype(q, k, v, g, b, w)
  state = _check_state(state, q, v, compute_dtype)
  segment_ids = _check_segment_ids(segment_ids, q.shape[:2])
  q, k, v, g, b, w, state, segment_ids = _vary_together(
    (q, k, v, g, b, w, state, segment_ids)
  )
  v_shape, state_shape, H = v.shape, state.shape, q.shape[2]
  v, w = gdn2_dispatch.fold_values(v, H), gdn2_dispatch.fold_values(w, H)
  state = gdn2_dispatch.fold_state(state, H)
  run = gdn2_dispatch.sequence_of(name)
  o, state = run(q, k, v, g, b, w, state, segment_ids, scale)
  return o.reshape(v_shape), gdn2_dispatch.unfold_state(state, state_shape)


@no_type_check
def gdn2_step(
  q: Float[Array, "B H K"],
  k: Float[Array, "B H K"],
  v: Float[Array, "B HV V"],
  g: Float[Array, "B H K"],
  b: Float[Array, "B H K"],
  w: Float[Array, "B HV V"],
  state: Float[Array, "B HV K V"],
  *,
  scale: float | None = None,
  implementation: Implementation | None = None,
) -> tuple[Float[Array, "B HV V"], Float[Array, "B HV K V"]]:
  """One token of Gated DeltaNet-2 (Eq. 10); `state` may be donated.

  Args:
    q: Query [B, H, K]; the arguments are those of gdn2 without the T axis.
    k: Key [B, H, K].
    v: Value [B, HV, V].
    g: Log-decay [B, H, K], <= 0.
    b: Erase gate [B, H, K].
    w: Write gate [B, HV, V].
    state: [B, HV, K, V], float32.
    scale: Factor on the output; None is K**-0.5.
    implementation: As in gdn2.

  Returns:
    o [B, HV, V] in the dtype of v, and the new state [B, HV, K, V].

  Raises:
    ValueError: naming the argument whose shape, dtype or value is wrong.
    NotImplementedError: the named implementation cannot run this call.
  """
  q, k, v, g, b, w = _check_inputs(q, k, v, g, b, w, time_axis=False)
  name = gdn2_dispatch.resolve(implementation, q, k, v, g, b, w, step=True)
  scale = _check_scale(scale, q.shape[-1])
  if state is None:
    raise ValueError("gdn2_step: state: got None, expected [B, HV, K, V]")
  state = _check_state(state, q, v, _compute_dtype(q, k, v, g, b, w))
  q, k, v, g, b, w, state = _vary_together((q, k, v, g, b, w, state))
  return gdn2_dispatch.step_of(name)(q, k, v, g, b, w, state, scale)


def _bad(name, got, expected):
  return ValueError(f"gdn2: {name}: got {got}, expected {expected}")


def _check_inputs(q, k, v, g, b, w, *, time_axis):
  """Returns the six inputs as arrays, or raises naming the wrong one."""
  arrays = {"q": q, "k": k, "v": v, "g": g, "b": b, "w": w}
  rank = 4 if time_axis else 3
  axes = "B, T, " if time_axis else "B, "
  for name, x in arrays.items():
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
      raise _bad(name, type(x).__name__, "an array")
    tail = "HV, V" if name in ("v", "w") else "H, K"
    if len(x.shape) != rank:
      raise _bad(name, f"shape {x.shape}", f"[{axes}{tail}]")
    if jnp.dtype(x.dtype).name not in _FLOATS:
      raise _bad(name, f"dtype {x.dtype}", f"one of {', '.join(_FLOATS)}")
  for name in ("k", "g", "b"):
    if arrays[name].shape != q.shape:
      raise _bad(name, f"shape {arrays[name].shape}", f"{q.shape}, that of q")
  if 0 in q.shape:
    raise _bad("q", f"shape {q.shape}", "every axis at least 1")
  H, K = q.shape[-2:]
  HV, V = v.shape[-2:]
  if v.shape[:-2] != q.shape[:-2]:
    raise _bad("v", f"shape {v.shape}", f"the leading axes {q.shape[:-2]} of q")
  if w.shape != v.shape:
    raise _bad("w", f"shape {w.shape}", f"{v.shape}, that of v")
  if HV == 0 or HV % H:
    raise _bad("v", f"{HV} heads", f"a positive multiple of the {H} of q")
  for name, axis, size in (("q", "K", K), ("v", "V", V)):
    if not MIN_HEAD_DIM <= size <= MAX_HEAD_DIM:
      raise _bad(
        name, f"{axis} = {size}", f"{MIN_HEAD_DIM} to {MAX_HEAD_DIM} channels"
      )
  arrays = {name: jnp.asarray(x) for name, x in arrays.items()}
  g = arrays["g"]
  if not isinstance(g, jax.core.Tracer):
    with jax.ensure_compile_time_eval():  # g may be a constant of a jit
      largest = float(g.max())
    if largest > 0:
      raise _bad("g", f"a maximum of {largest}", "log-decay <= 0")
  return tuple(arrays.values())


def _check_scale(scale, K):
  if scale is None:
    return K**-0.5
  if not isinstance(scale, numbers.Real) or not math.isfinite(scale):
    raise _bad("scale", repr(scale), "None or a finite number")
  return float(scale)


def _compute_dtype(*arrays):
  float64 = any(x.dtype == jnp.float64 for x in arrays)
  return jnp.dtype(jnp.float64 if float64 else jnp.float32)


def _check_state(state, q, v, dtype):
  shape = (q.shape[0], v.shape[-2], q.shape[-1], v.shape[-1])
  if state is None:
    return jnp.zeros(shape, dtype)
  expected = f"{dtype} [B, HV, K, V] = {shape}"
  if not hasattr(state, "shape") or not hasattr(state, "dtype"):
    raise _bad("state", type(state).__name__, expected)
  if tuple(state.shape) != shape or state.dtype != dtype:
    raise _bad("state", f"{state.dtype} {tuple(state.shape)}", expected)
  return jnp.asarray(state)


def _check_segment_ids(segment_ids, shape):
  if segment_ids is None:
    return None
  expected = f"integers [B, T] = {shape}"
  if not hasattr(segment_ids, "shape") or not hasattr(segment_ids, "dtype"):
    raise _bad("segment_ids", type(segment_ids).__name__, expected)
  is_integer = jnp.issubdtype(segment_ids.dtype, jnp.integer)
  if tuple(segment_ids.shape) != tuple(shape) or not is_integer:
    got = f"{segment_ids.dtype} {tuple(segment_ids.shape)}"
    raise _bad("segment_ids", got, expected)
  return jnp.asarray(segment_ids)


def _vary_together(arrays):
  """Under shard_map, marks every array as varying over the same mesh axes.

  A loop carries its state, and a gradient its cotangent, with the axes of all
  inputs together; zeros made here, or an input that is replicated, have fewer.
  """

  def varying(x):
    return jax.typeof(x).manual_axis_type.varying

  axes = frozenset().union(*(varying(x) for x in arrays if x is not None))
  return [
    x
    if x is None
    else lax.pcast(x, tuple(sorted(axes - varying(x), key=str)), to="varying")
    for x in arrays
  ]
