"""Kernel for one token of Gated DeltaNet-2 that updates the state in place.

With alpha = exp(g), e = b*k and S the old state, Eq. 10 is

  u  = w*v - S^T (alpha*e)
  o  = scale * (S^T (alpha*q) + (q.k) u)
  S' = alpha S + k u^T

so both erase and output use one read of the old state. Reading and writing the
state, K * V float32 numbers per head, takes nearly all the time; there is no
work for tensor cores.

A block of four warps has [K, tile] of one state in registers. Every warp has
columns of its own, so each sum over K stays inside a warp and needs no shared
memory. The update in place is safe because each thread writes exactly the
elements that it read.

States of many layers may be one array, of which a call updates one layer: a
slice of it would be copied out and back, which takes twice the time of the
kernel.

Legend: N layers, B batch, H key heads, HV value heads, K key channels, V value
channels; J columns of a tile.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.pallas import mpmd
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from gdn2_jax.kernels import target
from gdn2_jax.pallas import blocks

MAX_HEAD_DIM = 256  # K; 64 registers of a thread then hold the state
# With 32 columns, a warp's part of a row is one sector of memory (32 bytes),
# with 16 half of one. Narrow tiles make more blocks for small batches.
TILES = (32, 16)
_WARPS = 4
_LANES = 32
_MAX_ROWS = 65535  # limit of the second and third axis of a grid
_DTYPES = ("bfloat16", "float16", "float32")


def step_unsupported_reason(K: int, V: int, *dtypes: Any) -> str | None:
  """Reason that the kernel cannot run a call, or None.

  V counts the value channels of a state; dtypes are those of q, k, v, g, b and
  w, in any order.
  """
  if K % 16 or not 16 <= K <= MAX_HEAD_DIM:
    return f"K = {K}; the kernel needs a multiple of 16 up to {MAX_HEAD_DIM}"
  if V % TILES[-1] or V == 0:
    return f"V = {V}; the kernel needs a multiple of {TILES[-1]}"
  for dtype in dtypes:
    name = jnp.dtype(dtype).name
    if name not in _DTYPES:
      return f"dtype {name}; the kernel takes {', '.join(_DTYPES)}"
  return None


def gdn2_step_mosaic_gpu(
  q: Float[Array, "B H K"],
  k: Float[Array, "B H K"],
  v: Float[Array, "B HV V"],
  g: Float[Array, "B H K"],
  b: Float[Array, "B H K"],
  w: Float[Array, "B HV V"],
  states: Float[Array, "N B HV K V"],
  layer: Int[Array, ""] | int,
  scale: float,
  *,
  tile: int | None = None,
) -> tuple[Float[Array, "B HV V"], Float[Array, "N B HV K V"]]:
  """One token of Eq. 10; donated states are updated without a copy.

  Arguments are those of ops.gdn2.gdn2_step, each array bfloat16, float16 or
  float32. g = -inf clears a channel. `tile` is the number of columns of a
  block: 16, 32, 64 or 128 that divides V, or None to choose. Raises
  NotImplementedError with step_unsupported_reason.
  """
  B, H, K = q.shape
  HV, V = v.shape[1:]
  assert HV % H == 0 and states.shape[1:] == (B, HV, K, V)
  dtypes = [x.dtype for x in (q, k, v, g, b, w)]
  reason = step_unsupported_reason(K, V, *dtypes)
  if reason is None and max(B, HV) > _MAX_ROWS:
    reason = f"{B} rows of {HV} heads; the kernel takes {_MAX_ROWS} of each"
  if reason is not None:
    raise NotImplementedError(f"gdn2_step: mosaic_gpu: {reason}")
  if tile is None:
    tile = next(J for J in TILES if V % J == 0)
  assert V % tile == 0 and K % _rows_per_load(tile) == 0, (K, V, tile)
  # The target is an argument so that jit's cache has an entry per target.
  arrays = (q, k, v, g, b, w, states, jnp.asarray(layer, jnp.int32)[None])
  return _step(float(scale), tile, target.current(), *arrays)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _step(scale, tile, target_name, q, k, v, g, b, w, states, layer):
  assert target_name == target.current()
  B, HV, V = v.shape
  # Not plgpu.kernel: it aliases an operand with a single reference, one address
  # for reading and writing. XLA may use two addresses for an aliased call, if
  # it fuses the call with slices that it reads and writes.
  kernel = mpmd._mpmd_map(
    [
      (
        # Neighbouring blocks read the same rows of a state, so the same pages.
        plgpu.Mesh(grid=(B, HV, V // tile), grid_names=("row", "head", "tile")),
        functools.partial(_body, scale=scale, tile=tile),
      )
    ],
    out_types=[like(v), like(states)],
    input_output_aliases={6: 1},
    compiler_params=plgpu.CompilerParams(
      # An exact exp costs little here; the approximation loses digits where
      # decay is strong.
      approx_math=False,
      # No thread reads memory that another one wrote.
      unsafe_no_auto_barriers=True,
    ),
    interpret=target.interpret_params(),
    name="gdn2_step",
  )
  return tuple(kernel(q, k, v, g, b, w, states, layer))


def like(x):
  """Output type that varies over the same mesh axes as x."""
  return jax.ShapeDtypeStruct(
    x.shape, x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type
  )


def _body(
  q_gmem,
  k_gmem,
  v_gmem,
  g_gmem,
  b_gmem,
  w_gmem,
  S_gmem,
  layer_gmem,
  o_gmem,
  S_out_gmem,
  *,
  scale,
  tile,
):
  row, head = lax.axis_index("row"), lax.axis_index("head")
  layer = layer_gmem[0]
  H, K = q_gmem.shape[1:]
  key_head = lax.div(head, jnp.int32(v_gmem.shape[1] // H))
  columns = pl.ds(lax.axis_index("tile") * tile, tile)
  layout = state_layout(tile)

  def load(ref, layout):
    return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)

  def along_K(x):
    return lax.broadcast_in_dim(x, (K, tile), (0,))

  def along_V(x):
    return lax.broadcast_in_dim(x, (K, tile), (1,))

  S_KJ = load(S_gmem.at[layer, row, head, :, columns], layout)
  q_K, k_K, g_K, b_K = (
    load(ref.at[row, key_head], layout.reduce(1))
    for ref in (q_gmem, k_gmem, g_gmem, b_gmem)
  )
  v_J, w_J = (
    load(ref.at[row, head, columns], layout.reduce(0))
    for ref in (v_gmem, w_gmem)
  )
  alpha_K = jnp.exp(g_K)
  erased_J = jnp.sum(S_KJ * along_K(alpha_K * (b_K * k_K)), axis=0)
  u_J = w_J * v_J - erased_J
  o_J = jnp.sum(S_KJ * along_K(alpha_K * q_K), axis=0)
  o_J = scale * (o_J + jnp.sum(q_K * k_K) * u_J)
  S_KJ = along_K(alpha_K) * S_KJ + along_K(k_K) * along_V(u_J)
  # Stored directly and not through shared memory: a warp's part of o is less
  # than a sector of memory.
  blocks.store_untiled(o_gmem.at[row, head, columns], o_J.astype(o_gmem.dtype))
  S_KJ = plgpu.layout_cast(S_KJ, layout)
  blocks.store_untiled(S_out_gmem.at[layer, row, head, :, columns], S_KJ)


def _vector_size(tile):
  return min(4, tile // _WARPS // 2)  # 16 bytes where the tile allows


def _rows_per_load(tile):
  return _LANES * _vector_size(tile) // (tile // _WARPS)


def state_layout(tile):
  """Register layout [K, tile]: warps over columns, lanes also over rows."""
  tiling = fragmented_array.Tiling(
    (
      (_rows_per_load(tile), tile),
      (tile // _WARPS,),
      (_vector_size(tile),),
    )
  )
  return plgpu.Layout.TILED(
    tiling, warp_dims=(-3,), lane_dims=(-4, -2), vector_dim=-1
  )


def aot_cases() -> list[tuple[str, Callable, list[jax.ShapeDtypeStruct]]]:
  """Representative calls: name, function (donate argument 6), arguments."""

  def case(name, B, H, HV, K, V, dtype="bfloat16", layers=1):
    def token(*shape):
      return jax.ShapeDtypeStruct(shape, dtype)

    def step(q, k, v, g, b, w, states):
      arrays = (q, k, v, g, b, w, states)
      return gdn2_step_mosaic_gpu(*arrays, layers - 1, K**-0.5)

    key, value = token(B, H, K), token(B, HV, V)
    g = jax.ShapeDtypeStruct((B, H, K), "float32")
    states = jax.ShapeDtypeStruct((layers, B, HV, K, V), "float32")
    return name, step, [key, key, value, g, key, value, states]

  return [
    case("step B=1", 1, 16, 16, 128, 128),
    case("step B=64", 64, 16, 16, 128, 128),
    case("step B=512", 512, 16, 16, 128, 128),
    case("step K=64 V=64", 64, 16, 16, 64, 64),
    case("step K=256 V=256", 64, 8, 8, 256, 256),
    case("step folded V=512", 64, 4, 4, 128, 512),
    case("step grouped HV=4H", 64, 4, 16, 128, 128),
    case("step V=48", 64, 16, 16, 48, 48),
    case("step float16", 64, 16, 16, 128, 128, "float16"),
    case("step float32", 64, 16, 16, 128, 128, "float32"),
  ]
