"""Building blocks shared by the kernels that work on chunks.

A chunk is C = 64 tokens, the number of rows of one wgmma (the matrix product of
a warpgroup, which is 128 threads). A warpgroup works on tiles of 64 channels.
Legend: r, s rows (tokens) of a chunk, i a token whose log-decay is summed.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gdn2_jax.kernels import target

C = 64  # tokens of a chunk
TILE = 64  # channels of a tile: one 128-byte row of 16-bit numbers
LEVELS = 6  # log2(C)
ROWS = plgpu.Layout.WGMMA

# Log-decay of a restart. exp of it is exactly 0 in float32, and so is exp of
# every sum that includes it, because all terms are <= 0. Not -inf: sums are
# matrix products, in which 0 * -inf would give NaN.
LOG_ZERO = -1e4

# Kinds of tokens; the state restarts before a RESTART token.
PADDING, TOKEN, RESTART = 0, 1, 2


def smem(shape: tuple[int, ...], dtype: Any) -> Any:
  """Shared memory for TMA and wgmma: 8 rows by 128 bytes, swizzled."""
  columns = 128 // jnp.dtype(dtype).itemsize
  return plgpu.SMEM(
    shape,
    dtype,
    transforms=(
      plgpu.TilingTransform((8, columns)),
      plgpu.SwizzleTransform(128),
    ),
  )


def load(ref: Any) -> Any:
  """Loads a tile of 64 rows into registers, in the layout of wgmma results."""
  return plgpu.load(ref, layout=ROWS)


def load_global(ref: Any) -> Any:
  """Loads a tile that is read only once from global memory into registers."""
  return plgpu.load(ref, layout=ROWS, optimized=False)


def store_global(ref: Any, x: Any) -> None:
  """Stores a tile from registers in global memory."""
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


def in_turns(
  wg: Any, warpgroups: int, barrier: Any, body: Callable[[], None]
) -> None:
  """Runs `body` in one warpgroup after the other, with `meet` after each.

  Required for sums over rows: they pass from warp to warp through scratch
  memory, which is the same for all warpgroups of a block. Two warpgroups that
  reduce at the same time would overwrite each other's partial sums.
  """
  for n in range(warpgroups):
    if warpgroups == 1:
      body()
    else:
      pl.when(wg == n)(body)
    meet(barrier, warpgroups)


def in_rows(x: Any) -> Any:
  """Casts x to the layout of wgmma results, the only one that loops carry."""
  return plgpu.layout_cast(x, ROWS)


def transposed(ref: Any) -> Any:
  """Transposed view of a tile, as an operand of `dot`."""
  return ref.transpose((1, 0))


def dot(acc: Any, *operands: tuple[Any, Any]) -> Any:
  """Computes acc + sum of a @ b, with b in shared memory.

  a is in registers or shared memory. The call waits for the products, so the
  operands' memory is free afterwards. The
  interpreter has no wgmma with operands in registers and does not check wgmma
  reads for races, so it reads operands as ordinary memory.
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


_opaque: contextvars.ContextVar[Any] = contextvars.ContextVar(
  "opaque", default=None
)


@contextlib.contextmanager
def recomputed(kinds_ref: Any) -> Iterator[None]:
  """Recomputes masks and addresses inside the block, to save registers.

  LLVM hoists what does not change out of loops and shares it: here masks and
  matrix descriptors in over a hundred registers, which then spill. Inside this
  block they depend on a zero that is known only at run time, computed from a
  loaded kind (all kinds are below 256).
  """
  token = _opaque.set(kinds_ref[0])
  try:
    yield
  finally:
    _opaque.reset(token)


def _zero() -> Any:
  """Zero; inside `recomputed`, one that LLVM cannot fold."""
  word = _opaque.get()
  return 0 if word is None else lax.shift_right_logical(word, jnp.int32(8))


def tile_slice(n: Any) -> Any:
  """Slice of rows or channels 64*n to 64*(n+1)."""
  return pl.ds((n + _zero()) * C, C)


def tile_of(ref: Any, n: Any) -> Any:
  """Tile n of a buffer: rows C*n to C*(n+1).

  A slice, because wgmma inside pl.run_state rejects constant indices.
  """
  return ref.at[tile_slice(n)]


def _iota(shape: tuple[int, int], dimension: int) -> Any:
  x = plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=ROWS)
  zero = _zero()
  return x if isinstance(zero, int) else x + zero


def iotas(shape: tuple[int, int] = (C, C)) -> tuple[Any, Any]:
  """Row and column numbers of a tile."""
  return _iota(shape, 0), _iota(shape, 1)


def row_iota() -> Any:
  """Row numbers of a [C, TILE] tile."""
  return _iota((C, TILE), 0)


def loop(count: int | jax.Array, body: Any, init: Any) -> Any:
  """lax.fori_loop with an int32 index, also with x64 enabled."""
  return lax.fori_loop(jnp.int32(0), jnp.asarray(count, jnp.int32), body, init)


def level_half(level: Any) -> Any:
  """Rows in half a block at a level of the tree: 32, 16, ..., 1."""
  return lax.shift_right_logical(jnp.int32(C // 2), level)


def level_span(half: Any, *, transpose: bool = False) -> Any:
  """Mask M [r, i], True if row r's decay at a level includes log-decay i.

  A block of 2*half rows is split at its middle. A row r of the second half sums
  the log-decays from the middle to r, a row s of the first half those after s
  up to the middle. The product of both decays is the decay from s to r.
  """
  r, i = iotas()[:: -1 if transpose else 1]
  same_half = (r ^ i) < half
  return same_half & (((r & half) != 0) == (i <= r))


def prefix_span(*, transpose: bool = False) -> Any:
  """Mask M [r, i] = i <= r of the decay from the start of the chunk to r."""
  r, i = iotas()[:: -1 if transpose else 1]
  return i <= r


def suffix_span(*, transpose: bool = False) -> Any:
  """Mask M [s, i] = i > s of the decay from s to the end of the chunk."""
  s, i = iotas()[:: -1 if transpose else 1]
  return i > s


def chunk_span() -> Any:
  """Mask M [r, i], all True, of the decay of the whole chunk."""
  r, _ = iotas()
  return r >= 0


def everywhere(flag: Any, shape: tuple[int, int] = (C, C)) -> Any:
  """Broadcasts a scalar condition to a mask, which where() cannot."""
  return _iota(shape, 0) < jnp.where(flag, shape[0], 0)


def level_pairs(half: Any) -> Any:
  """Mask [r, s], True if a level has both rows in one block."""
  r, s = iotas()
  return (r ^ s) < 2 * half


def decay(span: Any, g_hi: Any, g_lo: Any) -> Any:
  """Decay exp(span @ g) in [0, 1] of log-decays g = g_hi + g_lo [C, TILE].

  `span` [C, C] is a mask, or a buffer of zeros and ones in the dtype of g_hi.
  All terms of a sum have one sign, so nothing cancels or overflows.
  """
  if span.dtype == jnp.bool_:
    span = jnp.where(span, 1.0, 0.0).astype(g_hi.dtype)
  return jnp.exp(dot(zeros(), (span, g_hi), (span, g_lo)))


def of_rows(vector: Any, shape: tuple[int, int] = (C, TILE)) -> Any:
  """Broadcasts one number per row, held in ROWS.reduce(1), over columns."""
  return lax.broadcast_in_dim(vector, shape, [0])


def of_columns(vector: Any, shape: tuple[int, int] = (C, TILE)) -> Any:
  """Broadcasts one number per column, held in ROWS.reduce(0), over rows."""
  return lax.broadcast_in_dim(vector, shape, [1])


def load_kinds(ref: Any) -> Any:
  """Loads the kinds of a chunk's tokens [C] as a [C, TILE] tile."""
  return of_rows(plgpu.load(ref, layout=ROWS.reduce(1)))


def log_decay(g: Any, kinds: Any) -> Any:
  """Log-decay g, 0 at padding, LOG_ZERO at restarts, and not below LOG_ZERO."""
  g = jnp.where(kinds == PADDING, 0.0, g)
  g = jnp.where(kinds == RESTART, LOG_ZERO, g)
  return jnp.where(g < LOG_ZERO, LOG_ZERO, g)


def call(name: str, body: Any, out_type: Any, **kwargs: Any) -> Any:
  """plgpu.kernel with the name and the options of all kernels here."""
  body.__name__ = name
  return plgpu.kernel(
    body,
    out_type=out_type,
    compiler_params=plgpu.CompilerParams(approx_math=True),
    interpret=target.interpret_params(),
    **kwargs,
  )


def struct(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
  """Shape and dtype of a result."""
  return jax.ShapeDtypeStruct(shape, dtype)
