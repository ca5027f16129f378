r"""Short convolution with SiLU on a GPU, forward and backward.

x_{t-i} comes from the state if t - i < 0, and is zero if i > reach_t: the token
is in another segment, or t is padding, which has reach -1.

  z_t  = sum_i kernel[W-1-i] x_{t-i},  i = 0 .. W-1
  y_t  = z_t s_t,  s_t = sigmoid(z_t)

  dz_t = dy_t (s_t + z_t s_t (1 - s_t))
  dx_t = sum_i kernel[W-1-i] dz_{t+i}
  dkernel[W-1-i] = sum_t dz_t x_{t-i}

A block of four warps goes through its tokens in order, for a few hundred
channels, and keeps in registers what the next tokens need: the last W - 1
inputs and, in the backward pass, their unfinished gradients. So each input is
read once, except W - 1 tokens on either side of a block, and the reach of a
token is one number for all threads instead of a mask. Both kernels are limited
by memory bandwidth.

Legend: B batch, T tokens, C channels, W taps, J channels of a block.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from gdn2_jax.pallas import blocks
from gdn2_jax.pallas.partition import over_batch_and_heads
from gdn2_jax.pallas.projected import sigmoid, sigmoids

MAX_TAPS = 4  # a thread keeps the sums of dkernel in registers
BLOCK = 64  # tokens per block
# Channels per block: 4, 2 or 1 per thread. The backward pass needs more
# registers per channel, so it takes at most 2.
_TILES, _GRADIENT_TILES = (512, 256, 128), (256, 128)
_DTYPES = ("bfloat16", "float16")
_AT_A_TIME = 4  # tokens whose loads are in flight


def unsupported_reason(x: Any, kernel: Any) -> str | None:
  """Reason that the kernels cannot run a call with x and kernel, or None."""
  T, W = x.shape[1], kernel.shape[0]
  if T < BLOCK:
    return f"T = {T}, expected at least {BLOCK} tokens"
  if not 2 <= W <= MAX_TAPS:
    return f"W = {W}, expected 2 to {MAX_TAPS}"
  if jnp.dtype(x.dtype).name not in _DTYPES:
    return f"dtype {jnp.dtype(x.dtype).name}, expected {' or '.join(_DTYPES)}"
  return None


def short_conv_silu_mosaic_gpu(
  x: Float[Array, "B T C"],
  kernel: Float[Array, "W C"],
  state: Float[Array, "B W-1 C"] | None,
  reach: Int[Array, "B T"] | None,
) -> Float[Array, "B T C"]:
  """Computes silu(conv(x)) [B, T, C], differentiable in all but reach.

  Arguments are those of ops.short_conv, except `reach`: the number of earlier
  tokens that a token sees, at most W-1; -1 is padding, whose output is 0. None
  means W-1 for all tokens.
  """
  if state is None:
    state = jnp.zeros((x.shape[0], kernel.shape[0] - 1, x.shape[2]), x.dtype)
  return _differentiable(x, kernel, state, reach)


@jax.custom_vjp
def _differentiable(x, kernel, state, reach):
  operands, layouts = _operands(x, kernel, state, reach)
  (y,) = over_batch_and_heads(forward, layouts, ("b.h",))(*operands)
  return y[:, : x.shape[1]]


def _forward(x, kernel, state, reach):
  return _differentiable(x, kernel, state, reach), (x, kernel, state, reach)


def _backward(residuals, dy):
  x, kernel, state, reach = residuals
  dy = dy.astype(x.dtype)
  operands, layouts = _operands(x, kernel, state, reach, dy)
  run = over_batch_and_heads(backward, layouts, ("b.h", "b..h"))
  dx, sums = run(*operands)
  # Only the first W - 1 tokens see the state; XLA computes its gradient.
  n = min(x.shape[1], kernel.shape[0] - 1)
  reach = None if reach is None else reach[:, :n]
  _, pullback = jax.vjp(
    lambda state: _first_tokens(x[:, :n], kernel, state, reach), state
  )
  dy = dy[:, :n].astype(jnp.float32)
  if reach is not None:
    dy = jnp.where(reach[..., None] >= 0, dy, 0)
  (dstate,) = pullback(dy)
  dkernel = sums.sum(axis=(0, 1)).astype(kernel.dtype)
  return dx[:, : x.shape[1]], dkernel, dstate, None


_differentiable.defvjp(_forward, _backward)


def _operands(x, kernel, state, reach, *more):
  """Operands of the kernels, padded to whole blocks, and their layouts."""
  tokens = -x.shape[1] % BLOCK

  def whole(x):
    widths = ((0, 0), (0, tokens), *(x.ndim - 2) * ((0, 0),))
    return jnp.pad(x, widths) if tokens else x

  # Every operand of a call that is split over rows has a batch axis.
  kernel = jnp.broadcast_to(kernel[None], (x.shape[0], *kernel.shape))
  operands = [whole(x), kernel, state, *map(whole, more)]
  layouts = len(operands) * ["b.h"]
  if reach is not None:
    operands.append(whole(reach))
    layouts.append("b")
  return operands, tuple(layouts)


def _first_tokens(x, kernel, state, reach):
  """Output of the first n tokens in float32, by XLA."""
  n, W = x.shape[1], kernel.shape[0]
  inputs = jnp.concatenate([state, x], axis=1).astype(jnp.float32)
  taps = kernel.astype(jnp.float32)[:, None, None]
  z = jnp.zeros(x.shape, jnp.float32)
  for i in range(W):
    seen = inputs[:, W - 1 - i :][:, :n]
    if reach is not None:
      seen = jnp.where(reach[..., None] >= i, seen, 0)
    z += taps[W - 1 - i] * seen
  return jax.nn.silu(z)


def forward(x, kernel, state, reach=None):
  """Output for whole blocks of tokens; kernel is [B, W, C]."""
  y = blocks.struct(x.shape, x.dtype)
  operands = [x, kernel, state]
  return _call("short_conv", _forward_body, operands, reach, [y], _TILES)


def backward(x, kernel, state, dy, reach=None):
  """Gradient dx, and partial sums [B, blocks, W, C] of dkernel."""
  (B, T, C), W = x.shape, kernel.shape[1]
  dx = blocks.struct(x.shape, x.dtype)
  sums = blocks.struct((B, T // BLOCK, W, C), jnp.float32)
  return _call(
    "short_conv_grad",
    _backward_body,
    [x, kernel, state, dy],
    reach,
    [dx, sums],
    _GRADIENT_TILES,
  )


def _call(name, body, operands, reach, out_type, tiles):
  B, T, C = operands[0].shape
  # A device may hold any number of channels.
  if C % tiles[-1]:
    return _call_padded(name, body, operands, reach, out_type, tiles)
  J = next(J for J in tiles if C % J == 0)
  if reach is not None:
    operands = [*operands, reach]

  def run(*refs):
    inputs, outputs = list(refs[: len(operands)]), refs[len(operands) :]
    reach_gm = None if reach is None else inputs.pop()
    x_gm, kernel_gm, state_gm, *more = inputs
    body(_Walk(x_gm, kernel_gm, state_gm, reach_gm, J), *more, *outputs)

  return tuple(
    blocks.call(
      name,
      run,
      out_type,
      grid=(B, C // J, T // BLOCK),
      grid_names=("row", "tile", "block"),
    )(*operands)
  )


def _call_padded(name, body, operands, reach, out_type, tiles):
  C = operands[0].shape[-1]
  more = -C % tiles[-1]

  def pad(x):
    return jnp.pad(x, (*(x.ndim - 1) * ((0, 0),), (0, more)))

  wide = [blocks.struct((*x.shape[:-1], C + more), x.dtype) for x in out_type]
  results = _call(name, body, [pad(x) for x in operands], reach, wide, tiles)
  return tuple(x[..., :C] for x in results)


class _Walk:
  """Loop over the tokens of a block for J channels, in float32 vectors [J]."""

  def __init__(self, x_gm, kernel_gm, state_gm, reach_gm, J):
    self._x, self._state, self._reach = x_gm, state_gm, reach_gm
    self._layout = plgpu.Layout.WG_STRIDED((J,), vec_size=J // 128)
    self._row = lax.axis_index("row")
    self._channels = pl.ds(lax.axis_index("tile") * J, J)
    self.block = lax.axis_index("block")
    self.first = self.block * BLOCK
    self.W, self._J = kernel_gm.shape[1], J
    # taps[i] multiplies the input i tokens back.
    self.taps = [self.load(kernel_gm, i) for i in reversed(range(self.W))]

  def load(self, ref, n):
    """Loads token, tap or input n."""
    ref = ref.at[self._row, n, self._channels]
    x = plgpu.load(ref, layout=self._layout, optimized=False)
    return x.astype(jnp.float32)

  def store(self, ref, x, *index):
    """Stores x at a token, or at a block and tap."""
    ref = ref.at[(self._row, *index, self._channels)]
    blocks.store_untiled(ref, x.astype(ref.dtype))

  def zeros(self):
    """Initial value of a sum."""
    return plgpu.layout_cast(jnp.zeros((self._J,), jnp.float32), self._layout)

  def past(self):
    """The last W - 1 inputs before the block, the newest first."""
    is_first = self.block == 0
    return tuple(
      _select(
        is_first,
        self.load(self._state, self.W - 1 - i),
        # The first block loads an arbitrary token that is not selected.
        self.load(self._x, jnp.where(is_first, 0, self.first - i)),
      )
      for i in range(1, self.W)
    )

  def inputs(self, t, *more):
    """Loads reach and x of token t, and its rows of `more` arrays."""
    reach = None if self._reach is None else self._reach[self._row, t]
    return reach, *(self.load(ref, t) for ref in (self._x, *more))

  def along(self, token, carry, *more):
    """Loops carry = token(t, carry, *inputs(t, *more)) over the tokens."""

    def some(i, carry):
      tokens = [self.first + i * _AT_A_TIME + n for n in range(_AT_A_TIME)]
      loaded = [self.inputs(t, *more) for t in tokens]
      for t, inputs in zip(tokens, loaded, strict=True):
        carry = token(t, carry, *inputs)
      return carry

    return lax.fori_loop(0, BLOCK // _AT_A_TIME, some, carry)

  def convolve(self, window):
    """Sum z of the taps times the inputs x_t, x_{t-1}, ..."""
    return sum(tap * x for tap, x in zip(self.taps, window, strict=True))


def _seen(x, i, reach):
  """Input x of i tokens back, zero if out of reach."""
  return x if reach is None else _select(reach >= i, x, jnp.zeros_like(x))


def _select(condition, x, y):
  """jnp.where with a scalar condition, which Mosaic GPU does not broadcast."""
  return jnp.where(lax.broadcast_in_dim(condition, x.shape, ()), x, y)


def _forward_body(walk, y_gm):
  def token(t, past, reach, x):
    window = (x, *past)
    z = walk.convolve([_seen(x, i, reach) for i, x in enumerate(window)])
    walk.store(y_gm, z * sigmoid(z), t)
    return window[:-1]

  walk.along(token, walk.past())


def _backward_body(walk, dy_gm, dx_gm, sums_gm):
  def gradients(past, pending, reach, x, dy):
    """dz, the inputs seen, the next window, and partial dx_t, dx_{t-1}, ..."""
    window = (x, *past)
    seen = [_seen(x, i, reach) for i, x in enumerate(window)]
    z = walk.convolve(seen)
    s, rest = sigmoids(z)
    dz = _seen(dy * (s + z * s * rest), 0, reach)
    dx = [_seen(tap * dz, i, reach) for i, tap in enumerate(walk.taps)]
    dx = [dx[0], *(a + b for a, b in zip(dx[1:], pending, strict=True))]
    return dz, seen, window[:-1], tuple(dx)

  def token(t, carry, reach, x, dy):
    past, pending, sums = carry
    dz, seen, past, dx = gradients(past, pending, reach, x, dy)
    sums = tuple(a + dz * x for a, x in zip(sums, seen, strict=True))

    @pl.when(t - (walk.W - 1) >= walk.first)
    def _():
      walk.store(dx_gm, dx[-1], t - (walk.W - 1))

    return past, dx[:-1], sums

  zeros = walk.zeros()
  carry = walk.past(), (walk.W - 1) * (zeros,), walk.W * (zeros,)
  past, pending, sums = walk.along(token, carry, dy_gm)
  for i, total in enumerate(sums):
    walk.store(sums_gm, total, walk.block, walk.W - 1 - i)
  # The W - 1 tokens after the block complete the gradients of its last tokens.
  end, T = walk.first + BLOCK, dy_gm.shape[1]
  for t in (end + n for n in range(walk.W - 1)):
    reach, x, dy = walk.inputs(jnp.where(end < T, t, 0), dy_gm)
    dy = _select(end < T, dy, jnp.zeros_like(dy))
    _, _, past, dx = gradients(past, pending, reach, x, dy)
    walk.store(dx_gm, dx[-1], t - (walk.W - 1))
    pending = dx[:-1]


def aot_cases() -> list[tuple[str, Callable, list[jax.ShapeDtypeStruct], dict]]:
  """Representative calls: name, function, arguments, options."""
  cases = []
  for label, C, dtype, packed in (
    ("", 2048, "bfloat16", False),
    (" packed", 2048, "bfloat16", True),
    (" C=128 float16", 128, "float16", True),
  ):
    x = jax.ShapeDtypeStruct((4, 4096, C), dtype)
    kernel = jax.ShapeDtypeStruct((4, 4, C), dtype)
    state = jax.ShapeDtypeStruct((4, 3, C), dtype)
    reach = [jax.ShapeDtypeStruct((4, 4096), "int32")] if packed else []
    options = {"token_heads": 4 * 4096 * C // 128}
    for name, run, more in (
      ("short conv", forward, reach),
      ("short conv gradient", backward, [x, *reach]),
    ):
      cases.append((name + label, run, [x, kernel, state, *more], options))
  return cases
