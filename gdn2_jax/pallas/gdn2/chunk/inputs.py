"""Loads of a chunk: padding, restarts, norms and gates, range of float16."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gdn2_jax.pallas import blocks, inline, projected
from gdn2_jax.pallas.blocks import C
from gdn2_jax.pallas.gdn2.chunk.rows import (
  R,
  load_row,
  load_rows,
  store_row,
  store_rows,
)

_BIAS = 127  # of the exponent of a float32, as it is stored
_LARGEST = 2.0**127


def fetch(inputs: Any, rates: Any, s: Any, here: Any) -> None:
  """Starts loads of a chunk's rows and kinds; all warpgroups may wait.

  Args:
    inputs: q, k, b, g and kinds in global memory, [B, T, H, K] and [B, T].
    rates: [B, H, 2, K] in global memory, or None. With rates, g is f.
    s: Buffers by name, and "loaded", their barrier.
    here: Row of the batch, head and chunk.
  """
  row, h, c = here
  tokens = row, pl.ds(c * C, C)
  *keys, kinds = inputs

  def start(source, name):
    plgpu.copy_gmem_to_smem(source, s[name], s["loaded"])

  names = "q", "k", "b", "g" if rates is None else "f"
  for name, source in zip(names, keys, strict=True):
    start(source.at[(*tokens, h)], name)
  start(kinds.at[tokens], "kinds")
  if rates is not None:
    start(rates.at[row, h], "rates")


def needs_mask(s: Any, wg: Any) -> Any:
  """A scalar, True if a warpgroup's rows have padding or restarts."""
  return inline.any_differs(s["kinds"], wg * R, R, blocks.TOKEN)


def mask(s: Any, wg: Any, needed: Any, names: str = "qkbg") -> None:
  """Rewrites rows of padding and restarts among a warpgroup's 16, if needed.

  Padding gets q = k = b = g = 0, and a restart g = LOG_ZERO. A thread rewrites
  what it reads itself if it reads rows, so Rows needs no barrier.
  """

  @pl.when(needed)
  def _():
    def row(r, _):
      r = wg * R + r
      kind = s["kinds"][r]
      for name in names:
        x = load_row(s[name], r)
        is_padding, is_restart = (
          lax.broadcast_in_dim(kind == y, x.shape, ())
          for y in (blocks.PADDING, blocks.RESTART)
        )
        x = jnp.where(is_padding, 0.0, x)
        if name == "g":
          x = jnp.where(is_restart, blocks.LOG_ZERO, x)
        store_row(s[name], r, x)
      return jnp.int32(0)

    blocks.loop(R, row, jnp.int32(0))


def take_norms(s: Any, wg: Any) -> None:
  """Normalises q and k of a warpgroup's 16 rows (projected.py)."""
  for name in "qk":
    x = _load(s[name], wg)
    norm = lax.rsqrt((x * x).sum(axis=1) + projected.EPS)
    _store(s[name], wg, x * lax.broadcast_in_dim(norm, x.shape, (0,)))
  plgpu.commit_smem()  # other threads read these rows


def log_decays(s: Any, wg: Any, masked: Any) -> tuple[Any, ...]:
  """g of a warpgroup's 16 rows from f, a channel a thread (projected.py)."""
  f, g = (s[name].at[pl.ds(wg * R, R)] for name in "fg")
  rate, bias = (load_row(s["rates"], n) for n in range(2))
  layout = inline.channel_layout(rate.shape[0])
  rows = tuple(
    projected.log_decay(x, rate, bias, layout)
    for x in load_rows(f, range(R)).values()
  )

  def of_special_tokens():
    store_rows(g, rows)
    mask(s, wg, masked, "g")
    return tuple(load_rows(g, range(R)).values())

  return lax.cond(masked, of_special_tokens, lambda: rows)


def erase_gate(b: Any, scale: float) -> Any:
  """The erase gate of a row b [K]."""
  return scale * projected.sigmoid(b, inline.channel_layout(b.shape[0]))


def scale_to_float16(s: Any, wg: Any) -> None:
  """Scales rows of e, q and k by powers of two, where float16 requires it.

  A row whose largest magnitude is from 2^-10 to 2^14 stays as it is; that of
  others becomes 2^13 to 2^14. A factor depends on its row alone: if it depended
  on the chunk, later tokens could change bits of earlier ones. It is exact, but
  entries far below the largest of their row lose bits: 2^27 in a scaled row.

  s["undo"] gets the inverse factors on e, q and k [3, C], s["is_scaled"] ones
  for rows with a factor [C]; q, k and b are rewritten.
  """
  rows = pl.ds(wg * R, R)
  q, k, b = (_load_narrow(s[name], wg) for name in "qkb")
  one = jnp.int32(_BIAS)
  any_factor, undo = jnp.zeros((R,), jnp.int32), []
  for n, x in enumerate((b * k, q, k)):
    most = lax.bitcast_convert_type(_largest(x), jnp.int32)
    exponent = most >> 23  # with _BIAS
    is_fine = (exponent >= _BIAS - 10) & (exponent < _BIAS + 14)
    is_fine |= exponent == 0  # zeros, as at padding
    # Not below 2^-112: the inverse of the factor must be a float32.
    of_rows = jnp.where(is_fine, one, jnp.maximum(exponent, 15) - 13)
    any_factor |= of_rows ^ one
    undo.append(lax.bitcast_convert_type(of_rows << 23, jnp.float32))
    blocks.store_untiled(s["undo"].at[n, rows], undo[n])
  blocks.store_untiled(s["is_scaled"].at[rows], any_factor)
  plgpu.commit_smem()  # other threads read both

  @pl.when(is_scaled(s, wg))
  def _():
    for_e, for_q, for_k = (1.0 / x for x in undo)
    for name, factor in (("q", for_q), ("k", for_k), ("b", for_e * undo[2])):
      x = _load(s[name], wg)
      x *= lax.broadcast_in_dim(factor, x.shape, (0,))
      # b makes b * k have the factor on e. It may leave float32 where k is so
      # small that it is zero as float16.
      _store(s[name], wg, jnp.clip(x, -_LARGEST, _LARGEST))
    plgpu.commit_smem()  # other threads read the rows


def is_scaled(s: Any, wg: Any) -> Any:
  """A scalar, True if one of the warpgroup's rows is scaled."""
  return inline.any_differs(s["is_scaled"], wg * R, R, 0)


def _vectors():
  """Layout [16, K]: a thread has 16 bytes of a row in every 64 channels."""
  # The tiled shape is [4, 1, 4, 8, 1, 8].
  return blocks.register_layout(
    ((R, 64), (R // 4, 64), (1, 8)), (-6,), (-4, -3)
  )


def _largest(x):
  """Largest magnitude of a row, float32; pairs of 16 bits are compared."""
  x = jnp.abs(x)
  if x.shape[1] == 128:
    x = jnp.maximum(x[:, :64], x[:, 64:])
  return x.astype(jnp.float32).max(axis=1)


def _load_narrow(ref, wg):
  rows = ref.at[pl.ds(wg * R, R)]
  return plgpu.load(rows, layout=_vectors(), optimized=False)


def _load(ref, wg):
  return inline.widen(_load_narrow(ref, wg), _vectors())


def _store(ref, wg, x):
  blocks.store_untiled(ref.at[pl.ds(wg * R, R)], x.astype(ref.dtype))
