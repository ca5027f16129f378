"""Causal depthwise convolution over time, with a few taps.

    y_t = bias + sum_i kernel[W-1-i] * x_{t-i},   i = 0 .. W-1

x_{t-i} comes from the state if t - i < 0, and is zero if it belongs to another
segment. silu(y) is optional.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from gdn2_jax.kernels import choice
from gdn2_jax.ops.checks import check_floating, check_integers
from gdn2_jax.ops.context.borders import (
  check_axis,
  from_rank,
  left_halo,
  vary,
  vary_together,
)

ACTIVATIONS = (None, "silu")


def _check(x, kernel, bias, activation, state, segment_ids):
  """Raises ValueError for wrong shapes and dtypes."""
  if activation not in ACTIVATIONS:
    raise ValueError(
      f"activation: expected one of {ACTIVATIONS}, got {activation!r}"
    )
  check_floating("x", x, "[B, T, C]")
  batch, time, channels = x.shape
  if time < 1:
    raise ValueError(f"x: expected T >= 1, got shape {x.shape}")
  if kernel.ndim != 2 or kernel.shape[0] < 1 or kernel.shape[1] != channels:
    raise ValueError(
      f"kernel: expected [W, C] with W >= 1 and C = {channels}, got "
      f"{kernel.shape}"
    )
  if bias is not None and bias.shape != (channels,):
    raise ValueError(f"bias: expected [C] = ({channels},), got {bias.shape}")
  if state is not None:
    expected = (batch, kernel.shape[0] - 1, channels)
    if state.shape != expected or state.dtype != x.dtype:
      raise ValueError(
        f"state: expected {x.dtype} [B, W-1, C] = {expected}, got "
        f"{state.dtype} of shape {state.shape}"
      )
  if segment_ids is not None:
    check_integers("segment_ids", segment_ids, "[B, T]", (batch, time))


# checkpoint keeps only the inputs as residuals: automatic differentiation alone
# would keep W float32 copies of x.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(4,))
def _taps(past_x, kernel, bias, ids, activation):
  """Sums the W shifted products of [B, W-1+T, C], the oldest input first."""
  width, channels = kernel.shape
  time = past_x.shape[1] - width + 1
  dtype = jnp.promote_types(past_x.dtype, jnp.float32)
  taps = kernel.astype(dtype).reshape((width, 1, 1, channels))
  # Every product is added to a running sum, never to another product: compilers
  # fuse a product and a sum into one multiply-add, and which of two products
  # they fuse depends on T. So the sum starts at a zero that they cannot fold.
  start = taps[0] - taps[0]
  if bias is not None:
    start = bias.astype(dtype).reshape((1, 1, channels))
  reach = None if ids is None else _reach(ids, width)
  y = jnp.broadcast_to(start, (past_x.shape[0], time, channels))
  # Widened before it is shifted, so that its gradient is summed in float32.
  wide_x = past_x.astype(dtype)
  for tap in range(width):
    x = wide_x[:, tap : tap + time]
    if reach is not None:
      # Mask the input, not the product: padding may hold NaN.
      x = jnp.where(reach[width - 1 - tap][:, :, None], x, 0)
    y = y + taps[tap] * x
  if reach is not None:
    y = jnp.where(reach[0][:, :, None], y, 0)
  if activation == "silu":
    y = jax.nn.silu(y)
  return y.astype(past_x.dtype)


def _reach(ids, width):
  """Masks reach[i][b, t]: True if x_{t-i} is in the same segment as x_t.

  Neighbours are compared one step at a time, so two segments with the same id
  stay apart if another segment or padding is between them.
  """
  time = ids.shape[1] - width + 1
  now = lax.slice_in_dim(ids, width - 1, width - 1 + time, axis=1)
  reach = [now != 0]
  for back in range(1, width):
    first = width - 1 - back
    earlier = lax.slice_in_dim(ids, first, first + time, axis=1)
    reach.append(reach[-1] & (earlier == now))
  return reach


def _last_inputs(past_x, ids, width):
  """The W-1 inputs of each row that end at its last token, padding aside."""
  if ids is None or width == 1:
    return past_x[:, past_x.shape[1] - width + 1 :]
  length = ids.shape[1]
  index = jnp.arange(length, dtype=jnp.int32).reshape((1, length))
  is_token = (ids != 0) & (index >= width - 1)
  # A row of padding alone ends at the initial state and returns it.
  last = jnp.max(jnp.where(is_token, index, width - 2), axis=1, keepdims=True)
  steps = jnp.arange(width - 1, dtype=jnp.int32).reshape((1, width - 1))
  slots = last - (width - 2) + steps
  slot_ids = jnp.take_along_axis(ids, slots, axis=1)
  inputs = jnp.take_along_axis(past_x, slots[:, :, None], axis=1)
  return _keep_unbroken(inputs, slot_ids == slot_ids[:, -1:])


def _keep_unbroken(inputs, is_same):
  """Zeros the inputs up to and including the last one of another segment."""
  is_same = jnp.flip(is_same, axis=1).astype(jnp.int32)
  unbroken = jnp.flip(jnp.cumprod(is_same, axis=1), axis=1)
  return jnp.where(unbroken[:, :, None] == 1, inputs, 0)


def short_conv(
  x: Float[Array, "B T C"],
  kernel: Float[Array, "W C"],
  *,
  bias: Float[Array, " C"] | None = None,
  activation: Literal["silu"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  state: Float[Array, "B W-1 C"] | None = None,
  implementation: str | None = None,
  axis_name: str | None = None,
) -> tuple[Float[Array, "B T C"], Float[Array, "B W-1 C"]]:
  """Causal depthwise convolution with a state and resets at segments.

  Taps never reach into another segment. The first segment of a call continues
  `state`. A sequence in several calls that pass the state on gives the same
  bits as one call, because it sums the same terms in the same order (measured
  on a CPU from 8 channels up; fewer may differ by one rounding).

  Padding (id 0) belongs between segments or at the end of a row; its output is
  0 and it does not enter the state. Padding inside a segment splits it in two,
  and padding at the start of a row separates the row from the initial state.

  Args:
    x: Inputs [B, T, C], T >= 1.
    kernel: [W, C]; tap W-1 multiplies x_t.
    bias: [C] or None.
    activation: "silu", applied in float32 before y is rounded, or None.
    segment_ids: [B, T] integers, or None for one segment per row.
    state: Inputs before the call [B, W-1, C] in x.dtype, oldest first; None
      means zeros.
    implementation: "xla"; "mosaic_gpu", kernels for Hopper that read and write
      every array once, for "silu" and 16 bits; None chooses as gdn2.
    axis_name: Mesh axis that the tokens are split over, for a call under
      jax.shard_map. x and segment_ids are then this device's shard, T >= W - 1,
      and both states belong to the whole sequence and are the same on all
      devices. None: the sequence is on one device.

  Returns:
    y [B, T, C] in x.dtype, accumulated in float32, and the state [B, W-1, C]:
    the last W-1 inputs of the last segment, zeros where it is shorter. A row of
    padding alone returns its state unchanged.

  Raises:
    ValueError: An argument has a wrong shape, dtype or value; it is named.
    NotImplementedError: The named implementation cannot run this call.
  """
  _check(x, kernel, bias, activation, state, segment_ids)
  batch, _, channels = x.shape
  width = kernel.shape[0]
  if axis_name is not None:
    check_axis(axis_name)
    # Marking the kernel here makes its gradient [W, C] the array that is summed
    # over devices, instead of larger products with x.
    x, kernel, bias, segment_ids, state = vary_together(
      (vary(x, axis_name), kernel, bias, segment_ids, state)
    )
    state = _inputs_before(x, width - 1, state, segment_ids, axis_name)
  if state is None:
    state = jnp.zeros((batch, width - 1, channels), x.dtype)
  past_x = jnp.concatenate([state, x], axis=1)
  ids = segment_ids
  if ids is not None:
    ids = _with_state_ids(ids, width)
  if choice.use_kernel(
    "short_conv",
    implementation,
    x,
    lambda: _kernel_reason(x, kernel, bias, activation),
    lambda: _kernels_are_right(x),
  ):
    y = _run_kernels(x, kernel, state, ids)
  else:
    y = _taps(past_x, kernel, bias, ids, activation)
  end = _last_inputs(past_x, ids, width)
  if axis_name is not None:
    end = _end_of_sequence(end, segment_ids, axis_name)
  return y, end


def _inputs_before(x, taps, state, segment_ids, axis_name):
  """Inputs before this shard [B, W-1, C], given those before the sequence."""
  if x.shape[1] < taps:
    raise ValueError(
      f"x: expected [B, T, C] with T >= {taps} tokens per device for a kernel"
      f" of {taps + 1} taps, got {x.shape}"
    )
  halo = left_halo(x, taps, axis_name=axis_name)
  if segment_ids is not None:
    ids = left_halo(segment_ids, taps, axis_name=axis_name)
    halo = _keep_unbroken(halo, ids == segment_ids[:, :1])
  if state is None:
    return halo
  return jnp.where(lax.axis_index(axis_name) == 0, state, halo)


def _end_of_sequence(end, segment_ids, axis_name):
  """Broadcasts the last inputs of the last shard that has a token."""
  last = lax.axis_size(axis_name) - 1
  if segment_ids is not None:
    # Padding at the end of a row may fill whole shards.
    is_empty = (segment_ids == 0).all(axis=1)
    ranks = jnp.where(is_empty, 0, lax.axis_index(axis_name))
    last = lax.pmax(ranks, axis_name)
  return from_rank(end, last, axis_name=axis_name)


def _kernel_reason(x, kernel, bias, activation):
  from gdn2_jax.pallas.short_conv import unsupported_reason

  if bias is not None or activation != "silu":
    return "the kernels take no bias, and only activation 'silu'"
  return unsupported_reason(x, kernel)


def _run_kernels(x, kernel, state, ids):
  from gdn2_jax.pallas.short_conv import short_conv_silu_mosaic_gpu

  reach = None
  if ids is not None:
    # ids starts with those of the state's W-1 inputs.
    reach = sum(r.astype(jnp.int32) for r in _reach(ids, len(kernel))) - 1
  return short_conv_silu_mosaic_gpu(x, kernel, state, reach)


def _kernels_are_right(x):
  def kernels(x, kernel, state, segment_ids):
    past_ids = _with_state_ids(segment_ids, len(kernel))
    return _run_kernels(x, kernel, state, past_ids)

  def reference(x, kernel, state, segment_ids):
    past_x = jnp.concatenate([state, x], axis=1)
    past_ids = _with_state_ids(segment_ids, len(kernel))
    return _taps(past_x, kernel, None, past_ids, "silu")

  return choice.is_right_here(
    "mosaic_gpu short_conv", kernels, reference, "short_conv", x
  )


def _with_state_ids(ids, width):
  """Prepends the first token's id for each input of the state."""
  first = jnp.broadcast_to(ids[:, :1], (ids.shape[0], width - 1))
  return jnp.concatenate([first, ids], axis=1)
