"""Building blocks that the chunk kernels share.

C = 64 tokens are a chunk: the rows of one wgmma. A warpgroup works on tiles of
64 channels. Legend: r, s rows (tokens) of a chunk, i a token whose log-decay
is summed.
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

# exp of anything below is exactly 0 in float32, and so is that of every sum
# it is part of (all terms are <= 0). Sums are formed by matrix products, in
# which -inf would give 0 * inf.
LOG_ZERO = -1e4

# Kinds of token.
PADDING, TOKEN, RESTART = 0, 1, 2


def smem(shape: tuple[int, ...], dtype: Any) -> Any:
  """Shared memory that TMA and wgmma read: 8 rows by 128 bytes, swizzled."""
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
  """A tile of 64 rows into registers, in the layout of wgmma's results."""
  return plgpu.load(ref, layout=ROWS)


def load_global(ref: Any) -> Any:
  """A tile from global memory into registers, for what is read once."""
  return plgpu.load(ref, layout=ROWS, optimized=False)


def store_global(ref: Any, x: Any) -> None:
  """A tile from registers into global memory, for what is written once."""
  if hasattr(plgpu, "store"):
    plgpu.store(ref, x, optimized=False)
  else:  # jax 0.11
    ref[...] = x


def meet(barrier: Any, warpgroups: int) -> None:
  """All warpgroups have come here, and see what the others stored."""
  plgpu.commit_smem()
  if warpgroups > 1:
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def in_turns(
  wg: Any, warpgroups: int, barrier: Any, body: Callable[[], None]
) -> None:
  """Runs `body` in one warpgroup after the other; all meet after each.

  For sums over rows. They go from warp to warp through scratch memory, and all
  warpgroups of a block have the same: at the same time, each would overwrite
  the parts of the other.
  """
  for n in range(warpgroups):
    if warpgroups == 1:
      body()
    else:
      pl.when(wg == n)(body)
    meet(barrier, warpgroups)


def in_rows(x: Any) -> Any:
  """Pins x to the layout of wgmma's results; loops carry nothing else."""
  return plgpu.layout_cast(x, ROWS)


def transposed(ref: Any) -> Any:
  """The transposed view of a tile, as an operand of `dot`."""
  return ref.transpose((1, 0))


def dot(acc: Any, *operands: tuple[Any, Any]) -> Any:
  """acc + sum of a @ b; a in registers or shared memory, b in shared memory.

  The interpreter has no wgmma on registers, and what it reads through wgmma
  is not looked at for races: there, operands are read as ordinary memory.
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
  """An accumulator."""
  return in_rows(jnp.zeros((rows, columns), jnp.float32))


def split(x: Any, dtype: Any) -> tuple[Any, Any]:
  """x as hi + lo of a 16-bit type: with both, products keep ~16 bits."""
  hi = x.astype(dtype)
  if hi.dtype == jnp.bfloat16:
    # Opaque, or LLVM rounds number by number for the way back to float32, at a
    # quarter of the rate of what rounds two at a time.
    hi = lax.optimization_barrier(hi)
  return hi, (x - hi.astype(jnp.float32)).astype(dtype)


def store_split(x: Any, hi_ref: Any, lo_ref: Any) -> None:
  """Stores hi and lo of x as operands of `dot`; commit_smem is the caller's."""
  hi_ref[...], lo_ref[...] = split(x, hi_ref.dtype)


def split_pairs(a: tuple[Any, ...], b: tuple[Any, ...]) -> list[Any]:
  """The products of a and b, each (hi, lo) or (hi,), but the smallest."""
  return [(x, y) for n, x in enumerate(a) for y in b[: len(b) - n]]


_opaque: contextvars.ContextVar[Any] = contextvars.ContextVar(
  "opaque", default=None
)


@contextlib.contextmanager
def recomputed(kinds_ref: Any) -> Iterator[None]:
  """Keeps masks and addresses made inside out of the registers of the rest.

  LLVM computes what it can only once, and what a loop does not change in front
  of it: here over a hundred registers of masks and matrix descriptors, which
  then spill. Inside, they depend on a zero that only a load at run time shows:
  kinds are below 256.
  """
  token = _opaque.set(kinds_ref[0])
  try:
    yield
  finally:
    _opaque.reset(token)


def _zero() -> Any:
  """A zero; inside `recomputed` one that LLVM cannot know."""
  word = _opaque.get()
  return 0 if word is None else lax.shift_right_logical(word, jnp.int32(8))


def tile_slice(n: Any) -> Any:
  """Rows or channels 64*n to 64*(n+1)."""
  return pl.ds((n + _zero()) * C, C)


def tile_of(ref: Any, n: Any) -> Any:
  """Rows C*n to C*(n+1) of a buffer of tiles.

  A slice and not an index: wgmma inside pl.run_state refuses constants.
  """
  return ref.at[tile_slice(n)]


def _iota(shape: tuple[int, int], dimension: int) -> Any:
  x = plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=ROWS)
  zero = _zero()
  return x if isinstance(zero, int) else x + zero


def iotas() -> tuple[Any, Any]:
  """Row and column numbers of a [C, C] tile."""
  return _iota((C, C), 0), _iota((C, C), 1)


def row_iota() -> Any:
  """Row numbers of a [C, TILE] tile."""
  return _iota((C, TILE), 0)


def loop(count: int, body: Any, init: Any) -> Any:
  """lax.fori_loop with an int32 index, whether or not x64 is on."""
  return lax.fori_loop(jnp.int32(0), jnp.int32(count), body, init)


def level_half(level: Any) -> Any:
  """Rows of half a block at a level: 32, 16, ..., 1."""
  return lax.shift_right_logical(jnp.int32(C // 2), level)


def level_span(half: Any, *, transpose: bool = False) -> Any:
  """M [r, i]: what a row's decay at a level sums, as booleans.

  A block of 2*half rows is cut at its middle. A row r of the second half sums
  the log-decays from the middle to r, a row s of the first half those after s
  up to the middle: exp of the two together is the decay from s to r.
  """
  r, i = iotas()[:: -1 if transpose else 1]
  same_half = (r ^ i) < half
  return same_half & (((r & half) != 0) == (i <= r))


def prefix_span(*, transpose: bool = False) -> Any:
  """M [r, i] = i <= r: the decay from the start of the chunk to r."""
  r, i = iotas()[:: -1 if transpose else 1]
  return i <= r


def suffix_span(*, transpose: bool = False) -> Any:
  """M [s, i] = i > s: the decay from s to the end of the chunk."""
  s, i = iotas()[:: -1 if transpose else 1]
  return i > s


def chunk_span() -> Any:
  """M [r, i], all true: the decay of the whole chunk, in every row."""
  r, _ = iotas()
  return r >= 0


def everywhere(flag: Any) -> Any:
  """A scalar condition as a [C, C] mask; where() does not broadcast it."""
  r, _ = iotas()
  return r < jnp.where(flag, C, 0)


def level_pairs(half: Any) -> Any:
  """[r, s] whose decay the level gives: both rows in one block."""
  r, s = iotas()
  return (r ^ s) < 2 * half


def decay(span: Any, g_hi: Any, g_lo: Any) -> Any:
  """exp of the log-decays summed over `span` [C, C]: in [0, 1].

  Sums of terms of one sign: nothing cancels, nothing overflows.

  Args:
    span: booleans, or a buffer of zeros and ones in the dtype of g_hi.
    g_hi: high part of the log-decays [C, TILE].
    g_lo: low part.
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
  """Kinds of a chunk's tokens [C] as a [C, TILE] tile."""
  return of_rows(plgpu.load(ref, layout=ROWS.reduce(1)))


def log_decay(g: Any, kinds: Any) -> Any:
  """g with padding that decays nothing and restarts that decay everything."""
  g = jnp.where(kinds == PADDING, 0.0, g)
  g = jnp.where(kinds == RESTART, LOG_ZERO, g)
  return jnp.where(g < LOG_ZERO, LOG_ZERO, g)


def call(name: str, body: Any, out_type: Any, **kwargs: Any) -> Any:
  """plgpu.kernel with what all kernels have in common.

  Args:
    name: of the kernel, in profiles and reports.
    body: its function of references.
    out_type: shapes and dtypes of its results.
    **kwargs: of plgpu.kernel.
  """
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
