"""The Triton kernels as functions of JAX arrays, without a gradient.

Legend: B batch, T tokens, H key heads, K key channels, V value channels of all
the value heads of a key head. Callers ask support.unsupported_reason first.
"""

import functools
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

NO_GRADIENT = (
  "gdn2: triton: the kernels are for inference and have no gradient; train"
  ' with implementation="xla", which also suits long sequences better'
)


def gdn2_step_triton(
  q: Float[Array, "B H K"],
  k: Float[Array, "B H K"],
  v: Float[Array, "B H V"],
  g: Float[Array, "B H K"],
  b: Float[Array, "B H K"],
  w: Float[Array, "B H V"],
  state: Float[Array, "B H K V"],
  scale: float,
  *,
  compute_capability: int | None = None,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
  """Runs Eq. 10 on one token; a donated `state` is updated in place.

  `compute_capability` (80, 89, ...) is given to compile for a GPU that is not
  there; None asks the device. Differentiation raises NotImplementedError.
  """
  arrays = (q, k, v, g, b, w, state)
  return _without_gradient(_step, scale, compute_capability)(*arrays)


def gdn2_triton(
  q: Float[Array, "B T H K"],
  k: Float[Array, "B T H K"],
  v: Float[Array, "B T H V"],
  g: Float[Array, "B T H K"],
  b: Float[Array, "B T H K"],
  w: Float[Array, "B T H V"],
  state: Float[Array, "B H K V"],
  segment_ids: Int[Array, "B T"] | None,
  scale: float,
  *,
  compute_capability: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
  """Runs Eq. 10 token by token, for short sequences.

  The state stays in registers. T tokens take T dependent steps, where "xla"
  works in chunks with matrix products. A donated `state` is updated in place.
  """
  arrays = (q, k, v, g, b, w, state)
  if segment_ids is not None:
    arrays += (segment_ids.astype(jnp.int32),)
  return _without_gradient(_sequence, scale, compute_capability)(*arrays)


def _without_gradient(function, scale, compute_capability):
  """Function of arrays that can be mapped over, not differentiated."""
  function = functools.partial(function, scale, compute_capability)
  call = jax.custom_jvp(_mapped_as_batch(function))
  call.defjvp(_no_gradient)
  return call


def _no_gradient(primals: Any, tangents: Any) -> NoReturn:
  del primals, tangents
  raise NotImplementedError(NO_GRADIENT)


def _mapped_as_batch(function):
  """Lets jax.vmap put its axis into B, the arrays' first axis."""
  call = jax.custom_batching.custom_vmap(function)

  @call.def_vmap
  def rule(axis_size, in_batched, *arrays):
    arrays = (
      x if batched else jnp.broadcast_to(x[None], (axis_size, *x.shape))
      for x, batched in zip(arrays, in_batched, strict=True)
    )
    outputs = call(*(x.reshape(-1, *x.shape[2:]) for x in arrays))
    outputs = tuple(x.reshape(axis_size, -1, *x.shape[1:]) for x in outputs)
    return outputs, (True, True)

  return call


def _step(scale, compute_capability, *arrays):
  from gdn2_jax.triton import kernels

  return _launch(
    kernels.gdn2_step_kernel,
    kernels.step_blocks,
    arrays,
    scale,
    compute_capability,
  )


def _sequence(scale, compute_capability, *arrays):
  from gdn2_jax.triton import kernels

  q, *_, state = arrays[:7]
  segment_ids = arrays[7:]
  # The kernel has a pointer to segments in any case: without them, one that it
  # does not read.
  (segments,) = segment_ids or (q,)
  return _launch(
    kernels.gdn2_sequence_kernel,
    kernels.sequence_blocks,
    (*arrays[:7], segments, q.shape[1]),
    scale,
    compute_capability,
    H=state.shape[1],
    HAS_SEGMENTS=bool(segment_ids),
  )


def _launch(kernel, blocks_for, args, scale, compute_capability, **constants):
  """Calls a kernel with outputs o, like v, and state, in place."""
  import jax_triton

  v, state = args[2], args[6]
  B, H, K, V = state.shape
  blocks = blocks_for(K, V)
  outputs = jax_triton.triton_call(
    *args,
    kernel=kernel,
    out_shape=(
      jax.ShapeDtypeStruct(v.shape, v.dtype),
      jax.ShapeDtypeStruct(state.shape, state.dtype),
    ),
    grid=blocks.programs(B * H, V),
    input_output_aliases={6: 1},
    num_warps=blocks.num_warps,
    compute_capability=compute_capability,
    SCALE=scale,
    K=K,
    V=V,
    BLOCK_K=blocks.block_k,
    BLOCK_V=blocks.block_v,
    **constants,
  )
  # jax_triton says of no output that it varies over the axes of a shard_map.
  axes = tuple(sorted(jax.typeof(state).manual_axis_type.varying, key=str))
  return tuple(lax.pcast(x, axes, to="varying") for x in outputs)
