"""Building blocks shared by the kernels that work on chunks.

A chunk is C = 64 tokens, the number of rows of one wgmma (the matrix product of
a warpgroup, which is 128 threads). Channels come in tiles of 64.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu

from gdn2_jax.kernels import target

C = 64  # tokens of a chunk
TILE = 64  # channels of a tile: one 128-byte row of 16-bit numbers
LEVELS = 6  # log2(C)
ROWS = plgpu.Layout.WGMMA

# Log-decay of a restart. exp of it is exactly 0 in float32, and so is exp of
# every sum that includes it, because all terms are <= 0. Not -inf, whose
# products with 0 are NaN.
LOG_ZERO = -1e4

# Kinds of tokens; the state restarts before a RESTART token.
PADDING, TOKEN, RESTART = 0, 1, 2


def register_layout(
  tiling: tuple[tuple[int, ...], ...],
  warp_dims: tuple[int, ...],
  lane_dims: tuple[int, ...],
) -> Any:
  """Layout of registers from nested tiles, which it makes canonical.

  Warps, lanes and vectors (the last one) are dimensions of the tiled shape,
  counted from its end.
  """
  layout = fragmented_array.TiledLayout(
    fragmented_array.Tiling(tiling),
    warp_dims=warp_dims,
    lane_dims=lane_dims,
    vector_dim=-1,
    _check_canonical=False,
  ).canonicalize()
  return plgpu.Layout.TILED(
    layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim
  )


def smem(shape: tuple[int, ...], dtype: Any) -> Any:
  """Shared memory for TMA and wgmma in tiles of 8 rows by 128 bytes."""
  return tiled(shape, dtype, 128 // jnp.dtype(dtype).itemsize)


def tiled(shape: tuple[int, ...], dtype: Any, columns: int) -> Any:
  """Shared memory for wgmma and TMA in tiles of 8 rows by `columns`."""
  swizzle = columns * jnp.dtype(dtype).itemsize
  return plgpu.SMEM(
    shape,
    dtype,
    transforms=(
      plgpu.TilingTransform((8, columns)),
      plgpu.SwizzleTransform(swizzle),
    ),
  )


def load(ref: Any) -> Any:
  """Loads a tile of 64 rows into registers, in the layout of wgmma results."""
  return plgpu.load(ref, layout=ROWS)


def load_global(ref: Any) -> Any:
  """Loads a tile that is read only once from global memory into registers."""
  return plgpu.load(ref, layout=ROWS, optimized=False)


def store_untiled(ref: Any, x: Any) -> None:
  """Stores an array in memory that has no tiles, as global memory."""
  if hasattr(plgpu, "store"):
    plgpu.store(ref, x, optimized=False)
  else:  # jax 0.11
    ref[...] = x


def meet(barrier: Any, warpgroups: int) -> None:
  """Barrier of all warpgroups; each then sees what the others stored."""
  # Before the barrier: TMA and wgmma of the others may read these stores.
  plgpu.commit_smem()
  if warpgroups > 1:
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def in_rows(x: Any) -> Any:
  """Casts x to the layout of wgmma results, the only one that loops carry."""
  return plgpu.layout_cast(x, ROWS)


def transposed(ref: Any) -> Any:
  """Transposed view of a tile, as an operand of `dot`."""
  return ref.transpose((1, 0))


def dot(acc: Any, *operands: tuple[Any, Any]) -> Any:
  """Computes acc + sum of a @ b, with b in shared memory.

  a is in registers or shared memory. The call waits for the products, so the
  operands' memory is free afterwards. The interpreter has no wgmma with
  operands in registers and does not check wgmma reads for races, so it reads
  operands as ordinary memory.
  """
  if target.is_interpreted():
    for a, b in operands:
      acc += jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)
    return acc

  def accumulate(acc_ref):
    for a, b in operands:
      plgpu.wgmma(acc_ref, a, b)

  return pl.run_state(accumulate)(plgpu.ACC.init(acc))


def zeros(rows: int = C, columns: int = TILE) -> Any:
  """Accumulator of zeros."""
  return in_rows(jnp.zeros((rows, columns), jnp.float32))


def split(x: Any, dtype: Any) -> tuple[Any, Any]:
  """Splits x into hi + lo of a 16-bit dtype, which together keep ~16 bits."""
  hi = x.astype(dtype)
  if hi.dtype == jnp.bfloat16:
    # Without the barrier LLVM combines rounding and widening and rounds one
    # number at a time, at a quarter of the rate of rounding pairs.
    hi = lax.optimization_barrier(hi)
  return hi, (x - hi.astype(jnp.float32)).astype(dtype)


def store_split(x: Any, hi_ref: Any, lo_ref: Any) -> None:
  """Stores hi and lo of x for `dot`; the caller then calls commit_smem."""
  hi_ref[...], lo_ref[...] = split(x, hi_ref.dtype)


def split_pairs(a: tuple[Any, ...], b: tuple[Any, ...]) -> list[Any]:
  """Products of a and b, each (hi, lo) or (hi,), without lo times lo."""
  return [(x, y) for n, x in enumerate(a) for y in b[: len(b) - n]]


def tile_of(ref: Any, n: Any) -> Any:
  """Tile n of a buffer: rows C*n to C*(n+1).

  A slice, because wgmma inside pl.run_state rejects constant indices.
  """
  return ref.at[pl.ds(n * C, C)]


def _iota(shape: tuple[int, int], dimension: int) -> Any:
  return plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=ROWS)


def iotas(shape: tuple[int, int] = (C, C)) -> tuple[Any, Any]:
  """Row and column numbers of a tile."""
  return _iota(shape, 0), _iota(shape, 1)


def loop(count: int | jax.Array, body: Any, init: Any) -> Any:
  """lax.fori_loop with an int32 index, also with x64 enabled."""
  return lax.fori_loop(jnp.int32(0), jnp.asarray(count, jnp.int32), body, init)


def everywhere(flag: Any, shape: tuple[int, int] = (C, C)) -> Any:
  """Broadcasts a scalar condition to a mask, which where() cannot."""
  return _iota(shape, 0) < jnp.where(flag, shape[0], 0)


def of_rows(vector: Any, shape: tuple[int, int] = (C, TILE)) -> Any:
  """Broadcasts one number per row, held in ROWS.reduce(1), over columns."""
  return lax.broadcast_in_dim(vector, shape, [0])


def of_columns(vector: Any, shape: tuple[int, int] = (C, TILE)) -> Any:
  """Broadcasts one number per column, held in ROWS.reduce(0), over rows."""
  return lax.broadcast_in_dim(vector, shape, [1])


def call(
  name: str,
  body: Any,
  out_type: Any,
  *,
  auto_barriers: bool = True,
  **kwargs: Any,
) -> Any:
  """plgpu.kernel with the name and the options of all kernels here.

  Without auto_barriers, Pallas puts no barriers around stores to shared memory
  and before TMA loads; see README.md section 9.
  """
  body.__name__ = name
  params = plgpu.CompilerParams(
    approx_math=True, unsafe_no_auto_barriers=not auto_barriers
  )
  return plgpu.kernel(
    body,
    out_type=out_type,
    compiler_params=params,
    interpret=target.interpret_params(),
    **kwargs,
  )


def struct(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
  """Shape and dtype of a result."""
  return jax.ShapeDtypeStruct(shape, dtype)
