"""Float64 truth for the op, inputs to try it on, and errors in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gdn2_jax.kernels.errors import relative_rms
from gdn2_jax.ops.gdn2 import xla
from gdn2_jax.ops.gdn2.api import gdn2

INPUTS = ("q", "k", "v", "g", "b", "w")
OUTPUTS = ("o", "final_state")
GRADIENTS = (*(f"d{name}" for name in INPUTS), "dinitial_state")

# The accuracy contract: float32 against float64, and low precision against
# the token scan in float32 on the same rounded inputs.
FLOAT32_BOUND = 1e-5
LOW_PRECISION_FACTOR = 2


def rel_rms(actual, exact) -> float:
  """Relative RMS error, measured in float64."""
  return relative_rms(*(np.asarray(x, np.float64) for x in (actual, exact)))


def assert_close(actual: dict, exact: dict, bound=FLOAT32_BOUND):
  """Every entry of `exact`, by name, within a bound (one or one per name)."""
  for name, value in exact.items():
    assert np.isfinite(np.asarray(actual[name], np.float64)).all(), name
    limit = bound[name] if isinstance(bound, dict) else bound
    error = rel_rms(actual[name], value)
    assert error <= limit, f"{name}: {error:.2e} > {limit:.2e}"


def unit(x):
  return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def make_case(
  rng,
  B=1,
  T=65,
  H=2,
  K=16,
  V=24,
  *,
  value_heads=1,
  g=(-5.0, -0.1),
  b=None,
  dtype=np.float32,
  segments=None,
) -> dict:
  """Unit q and k, a state and cotangents; g uniform in a range or constant."""

  def normal(*shape):
    return rng.standard_normal(shape)

  HV = H * value_heads
  low, high = g if isinstance(g, tuple) else (g, g)
  gates = sigmoid(normal(B, T, H, K))
  case = {
    "q": unit(normal(B, T, H, K)),
    "k": unit(normal(B, T, H, K)),
    "v": normal(B, T, HV, V),
    "g": rng.uniform(low, high, (B, T, H, K)),
    "b": gates if b is None else np.full((B, T, H, K), b),
    "w": sigmoid(normal(B, T, HV, V)),
    "initial_state": normal(B, HV, K, V),
    "do": normal(B, T, HV, V),
    "dfinal_state": normal(B, HV, K, V),
  }
  for name, x in case.items():
    keep = name in ("g", "initial_state", "dfinal_state")
    x = jnp.asarray(x, jnp.float32)
    case[name] = np.array(x if keep else x.astype(dtype))
  return case | {"segment_ids": segments, "scale": K**-0.5}


def oracle(case: dict) -> dict:
  """Eq. 10 token by token in float64, and its adjoint written by hand."""
  x = {n: np.asarray(case[n]).astype(np.float64) for n in INPUTS}
  state = np.asarray(case["initial_state"], np.float64)
  do = np.asarray(case["do"]).astype(np.float64)
  ds = np.asarray(case["dfinal_state"], np.float64)
  scale = float(case["scale"])
  B, T, H, _ = x["q"].shape
  HV = x["v"].shape[2]
  # Every value head gets its own copy of the key head that it reads.
  q, k, g, b = (np.repeat(x[n], HV // H, axis=-2) for n in "qkgb")
  v, w = x["v"], x["w"]
  valid, starts = _segments(case.get("segment_ids"), B, T)
  dot = functools.partial(np.einsum, "bhk,bhkv->bhv")
  dot_v = functools.partial(np.einsum, "bhkv,bhv->bhk")

  before, after = [], []
  o = np.zeros_like(v)
  for t in range(T):
    live = valid[:, t, None, None, None]
    old = np.where(starts[:, t, None, None, None], 0, state)
    decayed = np.exp(g[:, t])[..., None] * old
    u = w[:, t] * v[:, t] - dot(b[:, t] * k[:, t], decayed)
    new = decayed + k[:, t][..., None] * u[..., None, :]
    o[:, t] = np.where(live[..., 0], scale * dot(q[:, t], new), 0)
    before.append(state)
    state = np.where(live, new, state)
    after.append(new)

  heads = {"q": q, "k": k, "v": v, "g": g, "b": b, "w": w}
  grads = {n: np.zeros_like(y) for n, y in heads.items()}
  for t in reversed(range(T)):
    live = valid[:, t, None, None, None]
    restart = starts[:, t, None, None, None]
    old = np.where(restart, 0, before[t])
    alpha = np.exp(g[:, t])[..., None]
    decayed, e = alpha * old, b[:, t] * k[:, t]
    u = w[:, t] * v[:, t] - dot(e, decayed)
    dnew = ds + scale * q[:, t][..., None] * do[:, t][..., None, :]
    du = dot(k[:, t], dnew)
    de = -dot_v(decayed, du)
    ddecayed = dnew - e[..., None] * du[..., None, :]
    one = {
      "q": scale * dot_v(after[t], do[:, t]),
      "k": dot_v(dnew, u) + de * b[:, t],
      "v": du * w[:, t],
      "g": np.sum(alpha * ddecayed * old, axis=-1),
      "b": de * k[:, t],
      "w": du * v[:, t],
    }
    for n, y in one.items():
      grads[n][:, t] = np.where(live[..., 0], y, 0)
    ds = np.where(live, np.where(restart, 0, alpha * ddecayed), ds)
  for n in "qkgb":
    grads[n] = grads[n].reshape(B, T, H, HV // H, -1).sum(axis=3)
  return {
    "o": o,
    "final_state": state,
    **{f"d{n}": y for n, y in grads.items()},
    "dinitial_state": ds,
  }


def _segments(segment_ids, B, T):
  """Valid tokens and restarts, by the words of the definition."""
  if segment_ids is None:
    return np.ones((B, T), bool), np.zeros((B, T), bool)
  starts = np.zeros((B, T), bool)
  for row, ids in enumerate(np.asarray(segment_ids)):
    last = None
    for t, segment in enumerate(ids):
      if segment != 0:
        starts[row, t] = last is not None and segment != last
        last = segment
  return np.asarray(segment_ids) != 0, starts


@functools.cache
def op(implementation: str, chunk_size: int | None = None):
  """The op as a function of (inputs, state, segments, scale)."""

  def run(inputs, state, segment_ids, scale):
    if chunk_size is None:
      return gdn2(
        *inputs,
        state=state,
        segment_ids=segment_ids,
        scale=scale,
        implementation=implementation,
      )
    assert implementation == "xla"
    return xla.gdn2_xla(*inputs, state, segment_ids, scale, chunk_size)

  return run


@functools.partial(jax.jit, static_argnums=(0, 5))
def _value_and_grads(run, inputs, state, segment_ids, cotangents, scale):
  def call(inputs, state):
    return run(inputs, state, segment_ids, scale)

  outputs, pullback = jax.vjp(call, inputs, state)
  return outputs, pullback(cotangents)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _value(run, inputs, state, segment_ids, scale):
  return run(inputs, state, segment_ids, scale)


def evaluate(run, case: dict, *, gradients=True, jit=True) -> dict:
  """Outputs and gradients of an op on a case, named as in the oracle.

  Without `jit`, only functions are compiled that `run` itself has jitted.
  """
  inputs = tuple(jnp.asarray(case[n]) for n in INPUTS)
  state = jnp.asarray(case["initial_state"])
  ids = case.get("segment_ids")
  ids = None if ids is None else jnp.asarray(ids)
  scale = float(case["scale"])
  if not gradients:
    o, final = _value(run, inputs, state, ids, scale)
    return {"o": o, "final_state": final}
  cotangents = (
    jnp.asarray(case["do"]).astype(inputs[2].dtype),
    jnp.asarray(case["dfinal_state"]),
  )
  call = _value_and_grads if jit else _value_and_grads.__wrapped__
  outputs, (grads, dstate) = call(run, inputs, state, ids, cotangents, scale)
  names = (*OUTPUTS, *GRADIENTS)
  return dict(zip(names, (*outputs, *grads, dstate), strict=True))
