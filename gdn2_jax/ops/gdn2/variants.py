"""Other linear recurrences, expressed as gate patterns of gdn2 (Eq. 10).

Shapes are those of gdn2: q, k [B, T, H, K]; v [B, T, HV, V]; state
[B, HV, K, V]. A scalar per head is [B, T, H]. Every function returns what gdn2
returns and accepts its keyword arguments (scale, state, segment_ids, ...).
"""

from typing import Any, no_type_check

import jax.numpy as jnp
from jaxtyping import Array, Float

from gdn2_jax.ops.gdn2.api import gdn2
from gdn2_jax.ops.segments import segment_starts

Scalar = Float[Array, "B T H"]


# Excluded from type checking at run time, as gdn2 is: a wrong shape must reach
# the checks that name the argument.
@no_type_check
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


@no_type_check
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


@no_type_check
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


@no_type_check
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


@no_type_check
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
  """Mamba-3 with one input and one output (Eq. 16), by the trapezoidal rule.

    S_t = alpha_t S_{t-1} + (1 - lam_t) dt_t alpha_t k_{t-1} v_{t-1}^T
          + lam_t dt_t k_t v_t^T

  The recurrence is linear in its writes, so it is computed as the sum of two
  recurrences with b = 0; the second one writes the previous token. Rotate q
  and k before the call.

  Args:
    q: C of Mamba, rotated.
    k: B of Mamba, rotated.
    v: x of Mamba.
    g: log(alpha) = A * dt, per head.
    dt: Step size, per head.
    lam: Weight of the current token, in [0, 1], per head.
    previous: k and v of the token before the first one; None means zeros.
    **options: Keyword arguments of gdn2 except axis_name. With segment_ids,
      padding is allowed only between segments and at the end of a row.

  Returns:
    o and the final state, as gdn2 does. Pass (k[:, -1], v[:, -1]) as `previous`
    of the next call.

  Raises:
    ValueError: axis_name was given, or as in gdn2.
  """
  options = {"scale": 1.0} | options
  if options.get("axis_name") is not None:
    raise ValueError(
      f"mamba3: axis_name: got {options['axis_name']!r}, expected None: the"
      " token before a shard is not exchanged"
    )
  if previous is None:
    previous = jnp.zeros_like(k[:, 0]), jnp.zeros_like(v[:, 0])
  k_before, v_before = (
    jnp.concatenate([first[:, None], x[:, :-1]], axis=1)
    for first, x in zip(previous, (k, v), strict=True)
  )
  w_before = (1 - lam) * dt * jnp.exp(g)
  segment_ids = options.get("segment_ids")
  if segment_ids is not None:
    starts = segment_starts(jnp.asarray(segment_ids))
    w_before = jnp.where(starts[..., None], 0, w_before)
  o, state = mamba2(q, k, v, g=g, dt=lam * dt, **options)
  options["state"] = None
  o_before, state_before = mamba2(
    q, k_before, v_before, g=g, dt=w_before, **options
  )
  return o + o_before, state + state_before


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
