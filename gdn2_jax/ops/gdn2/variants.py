"""Other linear recurrences, expressed as gate patterns of gdn2 (Eq. 10).

Shapes are those of gdn2: q, k [B, T, H, K]; v [B, T, HV, V]; state
[B, HV, K, V]. A scalar per head is [B, T, H]. Every function returns what gdn2
returns and accepts its keyword arguments (scale, state, segment_ids, ...).

Mamba-3 (Eq. 16, from arXiv 2603.15569; one head, R ranks),

  S_t = a_t S_{t-1} + (1 - lam_t) dt_t a_t N_{t-1} + lam_t dt_t N_t
  N_t = sum_r k_{t,r} v_{t,r}^T,   a_t = exp(g_t),   o_{t,r} = S_t^T q_{t,r}

writes two tokens at a time. Its part without the current token,

  U_t = a_t (U_{t-1} + c_t N_{t-1}) = S_t - lam_t dt_t N_t
  c_t = lam_{t-1} dt_{t-1} + (1 - lam_t) dt_t,

is a recurrence of gdn2 with b = 0 whose writes are known before token t, so one
call computes it, exactly and causally, and products within a token add the
rest. R ranks are R tokens of that call: the r-th writes k_{t-1,r} and reads
q_{t,r} before ranks above r are written; products add those as well.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from gdn2_jax.ops.gdn2.api import gdn2, gdn2_step
from gdn2_jax.ops.gdn2.inputs import check_segment_ids
from gdn2_jax.ops.segments import before_each, last_token, segment_starts
from gdn2_jax.typing import unchecked_at_run_time

Scalar = Float[Array, "B T H"]


# Excluded from type checking at run time, as gdn2 is: a wrong shape must reach
# the checks that name the argument.
@unchecked_at_run_time
def kda(
  q: Float[Array, "B T H K"],
  k: Float[Array, "B T H K"],
  v: Float[Array, "B T HV V"],
  *,
  g: Float[Array, "B T H K"],
  beta: Scalar,
  **options: Any,
) -> tuple[Float[Array, "B T HV V"], Float[Array, "B HV K V"]]:
  """Kimi Delta Attention: b = w = beta, one scalar per head and token."""
  b = _per_channel("beta", beta, k, k.shape[-1])
  w = _per_value("beta", beta, k, v)
  return gdn2(q, k, v, g, b, w, **options)


@unchecked_at_run_time
def gated_deltanet(
  q: Float[Array, "B T H K"],
  k: Float[Array, "B T H K"],
  v: Float[Array, "B T HV V"],
  *,
  g: Scalar,
  beta: Scalar,
  **options: Any,
) -> tuple[Float[Array, "B T HV V"], Float[Array, "B HV K V"]]:
  """Gated DeltaNet: KDA with one decay for all channels of a head."""
  g = _per_channel("g", g, k, k.shape[-1])
  return kda(q, k, v, g=g, beta=beta, **options)


@unchecked_at_run_time
def deltanet(
  q: Float[Array, "B T H K"],
  k: Float[Array, "B T H K"],
  v: Float[Array, "B T HV V"],
  *,
  beta: Scalar,
  **options: Any,
) -> tuple[Float[Array, "B T HV V"], Float[Array, "B HV K V"]]:
  """DeltaNet: Gated DeltaNet without decay, g = 0."""
  g = jnp.zeros(k.shape, jnp.float32)
  return kda(q, k, v, g=g, beta=beta, **options)


@unchecked_at_run_time
def mamba2(
  q: Float[Array, "B T H K"],
  k: Float[Array, "B T H K"],
  v: Float[Array, "B T HV V"],
  *,
  g: Scalar,
  dt: Scalar,
  **options: Any,
) -> tuple[Float[Array, "B T HV V"], Float[Array, "B HV K V"]]:
  """Mamba-2 (SSD): nothing is erased, b = 0, and w = dt.

  In Mamba's symbols q is C, k is B, v is x and g is A * dt. The default scale
  is 1.
  """
  options = {"scale": 1.0} | options
  g = _per_channel("g", g, k, k.shape[-1])
  w = _per_value("dt", dt, k, v)
  return gdn2(q, k, v, g, jnp.zeros_like(k), w, **options)


@unchecked_at_run_time
def mamba3(
  q: Float[Array, "B T H K"],
  k: Float[Array, "B T H K"],
  v: Float[Array, "B T HV V"],
  *,
  g: Scalar,
  dt: Scalar,
  lam: Scalar,
  previous: tuple[Float[Array, "B H K"], Float[Array, "B HV V"]] | None = None,
  **options: Any,
) -> tuple[Float[Array, "B T HV V"], Float[Array, "B HV K V"]]:
  """Mamba-3 with one input and one output (SISO), mamba3_mimo of rank 1.

  Arguments, results and errors are those of mamba3_mimo without the axis R.
  """
  for name, x in (("q", q), ("k", k), ("v", v)):
    _check_rank(name, x, 4, "[B, T, heads, channels]")
  if previous is not None:
    previous = tuple(x[:, None] for x in previous)
  o, state = mamba3_mimo(
    *(x[:, :, None] for x in (q, k, v)),
    g=g,
    dt=dt,
    lam=lam,
    previous=previous,
    **options,
  )
  return o[:, :, 0], state


@unchecked_at_run_time
def mamba3_mimo(
  q: Float[Array, "B T R H K"],
  k: Float[Array, "B T R H K"],
  v: Float[Array, "B T R HV V"],
  *,
  g: Scalar,
  dt: Scalar,
  lam: Scalar,
  previous: tuple[Float[Array, "B R H K"], Float[Array, "B R HV V"]]
  | None = None,
  **options: Any,
) -> tuple[Float[Array, "B T R HV V"], Float[Array, "B HV K V"]]:
  """Mamba-3 with R inputs and R outputs per head (MIMO).

  Args:
    q: C of Mamba, rotated.
    k: B of Mamba, rotated.
    v: x of Mamba, for every rank.
    g: log(a) = A dt, per head, <= 0.
    dt: Step size, per head.
    lam: Weight of the current token, in [0, 1], per head.
    previous: k and v of the token before the first one; None means zeros.
    **options: Keyword arguments of gdn2 except axis_name and scheme; scale is
      1 by default.

  Returns:
    o of every rank, and the final state. For the next call, `previous` is k and
    v of the last token that is not padding (segments.last_token).

  Raises:
    ValueError: axis_name was given, or as in gdn2.
  """
  for name in ("axis_name", "scheme"):
    if options.get(name) is not None:
      raise ValueError(
        f"mamba3: {name}: got {options[name]!r}, expected None: the token "
        "before a shard is not exchanged"
      )
    options.pop(name, None)
  for name, x in (("q", q), ("k", k), ("v", v)):
    _check_rank(name, x, 5, "[B, T, R, heads, channels]")
  B, T, R, H, K = q.shape
  HV = v.shape[3]
  for name, x in (("g", g), ("dt", dt), ("lam", lam)):
    if x.shape != (B, T, H):
      raise ValueError(
        f"mamba3: {name}: got shape {x.shape}, expected [B, T, H] = {(B, T, H)}"
      )
  if k.shape != q.shape or v.shape[:3] != q.shape[:3] or HV % H:
    raise ValueError(
      f"mamba3: k, v: got shapes {k.shape} and {v.shape}, expected {q.shape} "
      f"and [B, T, R] of q with a multiple of {H} heads"
    )
  scale = options.pop("scale", 1.0)
  ids = check_segment_ids(options.pop("segment_ids", None), (B, T))
  if previous is None:
    previous = jnp.zeros_like(k[:, 0]), jnp.zeros_like(v[:, 0])
  k_first, v_first = (jnp.asarray(x) for x in previous)
  now = lam * dt  # weight of the current token
  # What the token before the call has written is in the state already.
  now_before = before_each(now, jnp.zeros_like(now[:, 0]), ids)
  k_before = before_each(k, k_first, ids)
  v_before = before_each(v, v_first, ids)
  weight = jnp.exp(g) * (now_before + (1 - lam) * dt)
  if ids is not None:
    weight = jnp.where(segment_starts(ids)[..., None], 0, weight)
  # One token of gdn2 for every rank; the first one decays the state.
  g_ranks = jnp.concatenate(
    [g[:, :, None], jnp.zeros((B, T, R - 1, H), g.dtype)], axis=2
  )
  o, state = _run(
    _as_tokens(q),
    _as_tokens(k_before),
    _as_tokens(v_before),
    _as_tokens(jnp.broadcast_to(g_ranks[..., None], q.shape)),
    jnp.zeros((B, T * R, H, K), k.dtype),
    _as_tokens(_of_values(weight, v)),
    segment_ids=None if ids is None else jnp.repeat(ids, R, axis=1),
    scale=scale,
    **options,
  )
  o = o.reshape(v.shape).astype(state.dtype)
  o += scale * _within(q, k, v, now, state.dtype)
  if R > 1:
    o += scale * _within(q, k_before, v_before, weight, state.dtype, later=True)
  if ids is not None:
    o = jnp.where((ids != 0)[:, :, None, None, None], o, 0)
  return o.astype(v.dtype), _with_last(state, k, v, now, ids)


def _per_channel(name, x, k, channels):
  """Broadcasts a scalar per head over channels."""
  if x.shape != k.shape[:-1]:
    raise ValueError(
      f"variants: {name}: got shape {x.shape}, expected [B, T, H] = "
      f"{k.shape[:-1]}"
    )
  return jnp.broadcast_to(x[..., None], (*x.shape, channels))


def _per_value(name, x, k, v):
  """Broadcasts a scalar per key head over the channels of its value heads."""
  B, T, H, _ = k.shape
  if v.shape[2] % H:
    raise ValueError(
      f"variants: v: got {v.shape[2]} heads, expected a multiple of {H}"
    )
  gate = _per_channel(name, x, k, v.shape[2] // H * v.shape[3])
  return gate.reshape(B, T, *v.shape[2:])


def _as_tokens(x):
  """Joins the axes T and R."""
  return x.reshape(x.shape[0], -1, *x.shape[3:])


def _run(*inputs, state=None, segment_ids=None, **options):
  """gdn2, or gdn2_step for one token."""
  if inputs[0].shape[1] > 1 or state is None or segment_ids is not None:
    return gdn2(*inputs, state=state, segment_ids=segment_ids, **options)
  o, state = gdn2_step(*(x[:, 0] for x in inputs), state=state, **options)
  return o[:, None], state


def _of_values(x, v):
  """Broadcasts a scalar per key head over ranks and value channels."""
  x = jnp.repeat(x, v.shape[3] // x.shape[2], axis=2)
  return jnp.broadcast_to(x[:, :, None, :, None], v.shape).astype(v.dtype)


def _within(q, k, v, weight, dtype, *, later=False):
  """Sums weight (q_r . k_s) v_s over ranks s of a token, or over s > r."""
  q, k, v, weight = (x.astype(dtype) for x in (q, k, v, weight))
  repeats, R = v.shape[3] // q.shape[3], q.shape[2]
  ranks = []
  # A loop over ranks keeps the order of sums, whatever the number of tokens.
  for r in range(R):
    terms = jnp.zeros_like(v[:, :, 0])
    for s in range(r + 1 if later else 0, R):
      dot = weight * jnp.sum(q[:, :, r] * k[:, :, s], axis=-1)
      dot = jnp.repeat(dot, repeats, axis=2)
      terms += dot[..., None] * v[:, :, s]
    ranks.append(terms)
  return jnp.stack(ranks, axis=2)


def _with_last(state, k, v, weight, segment_ids):
  """Adds what the last token of every row writes: S_T from U_T."""
  k, v, weight = (
    last_token(x, jnp.zeros_like(x[:, 0]), segment_ids).astype(state.dtype)
    for x in (k, v, weight)
  )
  repeats = v.shape[2] // k.shape[2]
  k = jnp.repeat(weight[:, None, :, None] * k, repeats, axis=2)
  product = jnp.einsum("brhk,brhv->bhkv", k, v, precision=lax.Precision.HIGHEST)
  return state + product


def _check_rank(name, x, rank, expected):
  if getattr(x, "ndim", None) != rank:
    got = getattr(x, "shape", type(x).__name__)
    raise ValueError(f"mamba3: {name}: got {got}, expected {expected}")
