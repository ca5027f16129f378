"""GDN-2 with the layer's norms and gates fused into the kernels.

  q / |q|, k / |k|      b = erase_scale sigmoid(b)      w = sigmoid(w)
  g = -exp(A_log) softplus(f + dt_bias), float32            (section 3.5)

The kernels for Hopper compute these as they load the inputs, so normalised
keys, gates and decays are never stored. Other implementations store them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gdn2_jax.kernels import choice
from gdn2_jax.ops.context.borders import vary_together
from gdn2_jax.ops.gdn2 import dispatch
from gdn2_jax.ops.gdn2.api import gdn2
from gdn2_jax.ops.gdn2.inputs import check_segment_ids, check_state
from gdn2_jax.ops.norm import l2_norm


class Projections(NamedTuple):
  """Inputs of the layer's norms and gates.

  Attributes:
    q: [B, T, H, K], before the norm.
    k: [B, T, H, K], before the norm.
    v: [B, T, HV, V].
    f: [B, T, H, K], before softplus.
    b: [B, T, H, K], before the sigmoid.
    w: [B, T, HV, V], before the sigmoid.
    a_log: [H], float32.
    dt_bias: [H, K], float32.

  f, b, w and dt_bias may have one channel that stands for all channels of a
  head. For `activate` alone, f may be None (no decay) and b None (no erasing).
  """

  q: Any
  k: Any
  v: Any
  f: Any
  b: Any
  w: Any
  a_log: Any
  dt_bias: Any


def activate(p: Projections, *, erase_scale: float = 1.0) -> tuple[Any, ...]:
  """Computes q, k, v, g (float32), b and w of the op from projections."""
  b = jnp.zeros_like(p.k) if p.b is None else jax.nn.sigmoid(p.b)
  w = jax.nn.sigmoid(p.w)
  if erase_scale != 1:
    b = erase_scale * b
  if p.f is None:
    g = jnp.zeros(p.k.shape, jnp.float32)
  else:
    dt = jax.nn.softplus(p.f.astype(jnp.float32) + p.dt_bias[None, None])
    g = -jnp.exp(p.a_log)[None, None, :, None] * dt
  g, b = (jnp.broadcast_to(x, p.k.shape) for x in (g, b))
  w = jnp.broadcast_to(w, p.v.shape)
  return l2_norm(p.q), l2_norm(p.k), p.v, g, b, w


def with_all_channels(p: Projections) -> Projections:
  """Repeats channels that stand for all of a head."""
  return p._replace(
    f=jnp.broadcast_to(p.f, p.k.shape),
    b=jnp.broadcast_to(p.b, p.k.shape),
    w=jnp.broadcast_to(p.w, p.v.shape),
    dt_bias=jnp.broadcast_to(p.dt_bias, p.k.shape[2:]),
  )


def gdn2_fused_gates(
  p: Projections,
  *,
  erase_scale: float = 1.0,
  state: Any = None,
  segment_ids: Any = None,
  implementation: str | None = None,
) -> tuple[Any, Any]:
  """Computes gdn2(*activate(p), ...), fused where the kernels support it."""
  if not _in_kernels(p, implementation):
    return gdn2(
      *activate(p, erase_scale=erase_scale),
      state=state,
      segment_ids=segment_ids,
      implementation=implementation,
    )
  p = with_all_channels(p)
  state = check_state(state, p.q, p.v, jnp.dtype(jnp.float32))
  segment_ids = check_segment_ids(segment_ids, p.q.shape[:2])
  *p, state, segment_ids = vary_together((*p, state, segment_ids))
  *arrays, a_log, dt_bias = p

  def run(q, k, v, f, b, w, state):
    p = Projections(q, k, v, f, b, w, a_log, dt_bias)
    return _run_kernels(p, state, segment_ids, erase_scale)

  return dispatch.run_folded(run, *arrays, state)


def _in_kernels(p, implementation):
  """True if the kernels run this call including norms and gates."""
  inputs = jax.eval_shape(activate, p)
  name = dispatch.resolve(implementation, *inputs, step=False)
  # The kernels load all six inputs in one dtype.
  if name != "mosaic_gpu" or p.f.dtype != p.q.dtype:
    return False
  # Only the choice for None depends on the self-check.
  return implementation is not None or choice.is_right_here(
    "mosaic_gpu gates",
    _check_kernels,
    _check_reference,
    "sequence",
    p.q,
  )


def _run_kernels(p, state, segment_ids, erase_scale, scale=None):
  from gdn2_jax.pallas.gdn2.api import gdn2_mosaic_gpu

  B, K = p.q.shape[0], p.q.shape[-1]
  rate = jnp.broadcast_to(-jnp.exp(p.a_log)[:, None], p.dt_bias.shape)
  rates = jnp.stack([rate, p.dt_bias], axis=1)
  return gdn2_mosaic_gpu(
    p.q,
    p.k,
    p.v,
    p.f,
    p.b,
    p.w,
    state,
    dispatch.token_kinds(segment_ids),
    K**-0.5 if scale is None else scale,
    rates=jnp.broadcast_to(rates[None], (B, *rates.shape)),
    erase_scale=erase_scale,
  )


def as_projections(
  q: Any, k: Any, v: Any, g: Any, b: Any, w: Any, state: Any
) -> Projections:
  """Builds projections from inputs of gdn2, to test kernels.

  A_log and dt_bias are slices of the state, so that the state's gradient
  includes theirs. f is rounded to bfloat16, which every dtype of q represents.
  """
  f = g.astype(jnp.bfloat16).astype(q.dtype)
  a_log, dt_bias = 0.1 * state[0, :, 0, 0], state[0, :, :, 0]
  return Projections(q, k, v, f, b, w, a_log, dt_bias)


def _check_kernels(q, k, v, g, b, w, state, segment_ids, scale):
  p = as_projections(q, k, v, g, b, w, state)
  return _run_kernels(p, state, segment_ids, 1.0, scale)


def _check_reference(q, k, v, g, b, w, state, segment_ids, scale):
  p = as_projections(q, k, v, g, b, w, state)
  run = dispatch.sequence_of("xla")
  return run(*activate(p), state, segment_ids, scale)
