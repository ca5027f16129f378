"""Validation of the op's arguments before anything is computed."""

import math
import numbers

import jax
import jax.numpy as jnp

MIN_HEAD_DIM = 16
MAX_HEAD_DIM = 256
_FLOATS = ("bfloat16", "float16", "float32", "float64")


def _bad(name, got, expected):
  return ValueError(f"gdn2: {name}: got {got}, expected {expected}")


def check_inputs(q, k, v, g, b, w, *, time_axis):
  """Returns the six inputs as arrays; raises ValueError naming a wrong one."""
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


def check_scale(scale, K):
  """Returns the factor on the output; raises ValueError if it is no number."""
  if scale is None:
    return K**-0.5
  if not isinstance(scale, numbers.Real) or not math.isfinite(scale):
    raise _bad("scale", repr(scale), "None or a finite number")
  return float(scale)


def dtype_of(*arrays):
  """Dtype of the arithmetic: float64 if an input is float64, else float32."""
  float64 = any(x.dtype == jnp.float64 for x in arrays)
  return jnp.dtype(jnp.float64 if float64 else jnp.float32)


def check_layer(layer, states):
  """Sizes of the axes before B of states, from the index of one of them.

  Returns () for None and (N,) for an index; raises ValueError if it is wrong.
  """
  if layer is None:
    return ()
  if getattr(states, "ndim", 0) != 5:
    raise _bad(
      "state",
      f"shape {getattr(states, 'shape', None)} with layer",
      "[N, B, HV, K, V]",
    )
  N = states.shape[0]
  is_integer = jnp.issubdtype(jnp.result_type(layer), jnp.integer)
  if jnp.ndim(layer) or not is_integer:
    raise _bad("layer", repr(layer), "None or an integer")
  if isinstance(layer, numbers.Integral) and not 0 <= layer < N:
    raise _bad("layer", str(layer), f"an index below the {N} states")
  return (N,)


def check_state(state, q, v, dtype, layers=()):
  """Returns the initial state, zeros for None; raises ValueError if wrong.

  `layers` are the sizes of axes before that of the batch.
  """
  shape = (*layers, q.shape[0], v.shape[-2], q.shape[-1], v.shape[-1])
  if state is None:
    return jnp.zeros(shape, dtype)
  axes = "[N, B, HV, K, V]" if layers else "[B, HV, K, V]"
  expected = f"{dtype} {axes} = {shape}"
  if not hasattr(state, "shape") or not hasattr(state, "dtype"):
    raise _bad("state", type(state).__name__, expected)
  if tuple(state.shape) != shape or state.dtype != dtype:
    raise _bad("state", f"{state.dtype} {tuple(state.shape)}", expected)
  return jnp.asarray(state)


def check_segment_ids(segment_ids, shape):
  """Returns the segment ids as an array; raises ValueError if wrong."""
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
