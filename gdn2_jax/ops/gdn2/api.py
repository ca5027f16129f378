"""Public Gated DeltaNet-2 op, over a sequence and over one token.

For every batch row and head it computes (Eq. 10)

  S = exp(g_t)[:, None] * S
  S = S + outer(k_t, w_t * v_t - S.T @ (b_t * k_t))
  o_t = scale * S.T @ q_t

inputs.py validates the arguments and dispatch.py chooses an implementation. The
equations are derived in reference.py (token by token) and xla.py (chunks).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gdn2_jax.ops.context.borders import check_axis, vary, vary_together
from gdn2_jax.ops.context.states import Scheme
from gdn2_jax.ops.gdn2 import dispatch
from gdn2_jax.ops.gdn2.dispatch import (
  IMPLEMENTATIONS,
  Implementation,
  select_implementation,
  unsupported_reason,
)
from gdn2_jax.ops.gdn2.inputs import (
  MIN_HEAD_DIM,
  check_inputs,
  check_layer,
  check_scale,
  check_segment_ids,
  check_state,
  dtype_of,
)
from gdn2_jax.ops.gdn2.sharded import Options, gdn2_on_shards
from gdn2_jax.typing import unchecked_at_run_time

__all__ = [
  "IMPLEMENTATIONS",
  "MIN_HEAD_DIM",
  "Implementation",
  "gdn2",
  "gdn2_step",
  "select_implementation",
  "unsupported_reason",
]


# Excluded from type checking at run time: a wrong shape must reach
# check_inputs, whose error names the argument.
@unchecked_at_run_time
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
  axis_name: str | None = None,
  scheme: Scheme | None = None,
) -> tuple[Float[Array, "B T HV V"], Float[Array, "B HV K V"]]:
  """Gated DeltaNet-2 (Eq. 10) over a sequence.

  Value head j reads key head j // (HV // H). All arithmetic is float32
  (float64 if an input is float64). Time comes before heads: arrays in the
  layout [B, H, T, *] are read as T heads of H tokens, which no check can find.

  Args:
    q: Queries [B, T, H, K], bfloat16, float16, float32 or float64.
    k: Keys [B, T, H, K].
    v: Values [B, T, HV, V], HV a multiple of H.
    g: Log-decay [B, T, H, K], <= 0, used in float32. A positive entry raises
      ValueError outside jit; under jit, where values are not known, the result
      is undefined.
    b: Erase gate [B, T, H, K], in [0, 1], or [0, 2] for negative eigenvalues.
    w: Write gate [B, T, HV, V], in [0, 1].
    scale: Factor on the output; None means K**-0.5.
    state: Initial state [B, HV, K, V], float32; None means zeros.
    segment_ids: [B, T] integers. The state restarts from zero where the id
      changes; 0 is padding, which neither reads nor changes the state and
      whose output is 0. The first segment starts from `state`.
    implementation: "reference" (token by token) or "xla" (chunkwise), both
      compiled by XLA (its TPU compiler fails on the gradient of "xla" for
      v5e, docs/scale.md), "mosaic_gpu" (kernels for an NVIDIA GPU of compute
      capability 9.0) or "triton" (forward pass of a short sequence on other
      NVIDIA GPUs). A named implementation runs or raises NotImplementedError;
      unsupported_reason gives the reason in advance. None takes
      select_implementation's choice.
    axis_name: Mesh axis that the tokens are split over, for a call under
      jax.shard_map. Every array with a T axis is then this device's shard,
      and both states belong to the whole sequence and are the same on all
      devices. A named implementation must also support V + K value channels.
      None: the sequence is on one device.
    scheme: Exchange of states between shards: "ring", "all_to_all" or
      "doubling" (docs/scale.md); None chooses. Only with axis_name.

  Returns:
    o [B, T, HV, V] in the dtype of v, and the final state [B, HV, K, V].

  Raises:
    ValueError: An argument has a wrong shape, dtype or value; it is named.
    NotImplementedError: The named implementation cannot run this call.
  """
  inputs = check_inputs(q, k, v, g, b, w, time_axis=True)
  q, _, v, *_ = inputs
  name = dispatch.resolve(implementation, *inputs, step=False)
  scale = check_scale(scale, q.shape[-1])
  state = check_state(state, q, v, dtype_of(*inputs))
  segment_ids = check_segment_ids(segment_ids, q.shape[:2])
  if axis_name is not None:
    check_axis(axis_name)
    state = vary(state, axis_name)
  elif scheme is not None:
    raise ValueError(
      f"gdn2: scheme: got {scheme!r} without axis_name, expected None"
    )
  *inputs, state, segment_ids = vary_together((*inputs, state, segment_ids))
  if axis_name is None:
    run = dispatch.sequence_of(name)
    return dispatch.run_folded(run, *inputs, state, segment_ids, scale)
  options = Options(axis_name, scale, name, implementation, scheme)
  return gdn2_on_shards(tuple(inputs), state, segment_ids, options)


@unchecked_at_run_time
def gdn2_step(
  q: Float[Array, "B H K"],
  k: Float[Array, "B H K"],
  v: Float[Array, "B HV V"],
  g: Float[Array, "B H K"],
  b: Float[Array, "B H K"],
  w: Float[Array, "B HV V"],
  state: Float[Array, "*N B HV K V"],
  *,
  layer: Int[Array, ""] | int | None = None,
  scale: float | None = None,
  implementation: Implementation | None = None,
) -> tuple[Float[Array, "B HV V"], Float[Array, "*N B HV K V"]]:
  """One token of Gated DeltaNet-2 (Eq. 10); `state` may be donated.

  Args:
    q: Query [B, H, K]; the arguments are those of gdn2 without the T axis.
    k: Key [B, H, K].
    v: Value [B, HV, V].
    g: Log-decay [B, H, K], <= 0.
    b: Erase gate [B, H, K].
    w: Write gate [B, HV, V].
    state: State before the token [B, HV, K, V], float32; with `layer` those of
      N layers, [N, B, HV, K, V].
    layer: Index in [0, N) of the state to use, an integer. Kernels then update
      that state in place, where a slice of all states would be copied.
    scale: Factor on the output; None means K**-0.5.
    implementation: As in gdn2.

  Returns:
    o [B, HV, V] in the dtype of v, and the new state, in the shape of `state`.

  Raises:
    ValueError: An argument has a wrong shape, dtype or value; it is named.
    NotImplementedError: The named implementation cannot run this call.
  """
  q, k, v, g, b, w = check_inputs(q, k, v, g, b, w, time_axis=False)
  name = dispatch.resolve(implementation, q, k, v, g, b, w, step=True)
  scale = check_scale(scale, q.shape[-1])
  if state is None:
    raise ValueError("gdn2_step: state: got None, expected [B, HV, K, V]")
  layers = check_layer(layer, state)
  state = check_state(state, q, v, dtype_of(q, k, v, g, b, w), layers)
  q, k, v, g, b, w, state = vary_together((q, k, v, g, b, w, state))
  run, inputs = dispatch.step_of(name), (q, k, v, g, b, w)
  if layer is None:
    o, state = run(*inputs, state[None], jnp.int32(0), scale)
    return o, state[0]
  return run(*inputs, state, jnp.asarray(layer, jnp.int32), scale)
