"""Kernel for the products within a chunk that do not need the state.

From q, k, b, g of C tokens (Eqs. 20-27, with decays as products over a binary
tree, README.md section 2):

  T_rs   = (b_r*k_r) . (exp(G_r - G_s) * k_s), r > s     A = (I + T)^-1
  Aqk_rs = scale q_r . (exp(G_r - G_s) * k_s), r >= s
  Y = A E, E = exp(G)*b*k     Qg = scale exp(G)*q     Kd = exp(G_C - G)*k

One warpgroup works on 64 key channels and sums its part of T and Aqk over all
levels of the tree; then the parts of the warpgroups are added. The backward
pass runs the same kernel with A given.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gdn2_jax.pallas import blocks, projected
from gdn2_jax.pallas.blocks import TILE, C


def intra(q, k, b, g, kinds, scale, A=None, *, rates=None, erase_scale=1.0):
  """Runs the kernel over all chunks.

  Args:
    q: [B, T, H, K], bfloat16 or float16; T a multiple of 64, K 64 or 128.
    k: [B, T, H, K], in the dtype of q.
    b: [B, T, H, K], in the dtype of q.
    g: [B, T, H, K], float32.
    kinds: [B, T] int32, blocks.PADDING, TOKEN or RESTART.
    scale: Factor on q.
    A: [B, H, NC, C, C], or None to compute it.
    rates: [B, H, 2, K], float32, or None; see projected.py. With rates, g is in
      the dtype of q.
    erase_scale: Factor on the erase gate, with rates.

  Returns:
    Y_neg = -Y, Qg, Kd [B, H, NC, C, K], Aqk, A [B, H, NC, C, C], all in the
    dtype of q, and the decay of the chunk gamma_C [B, H, NC, K], float32.
  """
  B, T, H, K = q.shape
  chunks, tiles = T // C, K // TILE
  dtype = q.dtype
  wide = blocks.struct((B, H, chunks, C, K), dtype)
  square = blocks.struct((B, H, chunks, C, C), dtype)
  gamma_C = blocks.struct((B, H, chunks, K), jnp.float32)
  extra = [x for x in (rates, A) if x is not None]
  out_type = [wide, wide, wide, square, gamma_C]
  if A is None:
    out_type.append(square)
  tile = (tiles, C, TILE)
  scratch = {
    "q": blocks.smem(tile, dtype),
    "k": blocks.smem(tile, dtype),
    "b": blocks.smem(tile, dtype),
    "g": blocks.smem(tile, jnp.float32),  # then parts of T and Aqk
    "kinds": plgpu.SMEM((tiles, C), jnp.int32),
    "g_hi": blocks.smem(tile, dtype),
    "g_lo": blocks.smem(tile, dtype),
    "kx_hi": blocks.smem(tile, dtype),
    "kx_lo": blocks.smem(tile, dtype),
    "X_hi": blocks.smem((C, C), dtype),
    "X_lo": blocks.smem((C, C), dtype),
    "W_hi": blocks.smem((C, C), dtype),
    "W_lo": blocks.smem((C, C), dtype),
    "A": blocks.smem((C, C), dtype),
    "Aqk_out": blocks.smem((C, C), dtype),
    "gamma_C": plgpu.SMEM((K,), jnp.float32),
    "loaded": plgpu.Barrier(
      num_arrivals=5 if rates is None else 6, num_barriers=tiles
    ),
    "met": plgpu.Barrier(num_arrivals=tiles),
    "A_loaded": plgpu.Barrier(),
  }
  if rates is not None:
    scratch["rates"] = plgpu.SMEM((tiles, 2, TILE), jnp.float32)
    scratch["squares"] = plgpu.SMEM((2, tiles, C), jnp.float32)
  names = tuple(scratch)

  def body(*refs):
    inputs, refs = list(refs[:5]), list(refs[5:])
    rates_gm = None if rates is None else refs.pop(0)
    A_gm = None if A is None else refs.pop(0)
    outputs, refs = refs[: len(out_type)], refs[len(out_type) :]
    s = dict(zip(names, refs, strict=True))
    inputs += [rates_gm, A_gm]
    _body(inputs, outputs, s, scale=scale, erase=erase_scale, tiles=tiles)

  out = blocks.call(
    "gdn2_intra",
    body,
    out_type,
    scratch_types=list(scratch.values()),
    grid=(B, H, chunks),
    grid_names=("b", "h", "c"),
    num_threads=tiles,
    thread_name="wg",
  )(q, k, b, g, kinds, *extra)
  if A is None:
    return (*out[:4], out[5], out[4])
  return (*out[:4], A, out[4])


def _body(inputs, outputs, s, *, scale, erase, tiles):
  *keys_gm, rates_gm, known_A_gm = inputs
  Y_gm, Qg_gm, Kd_gm, Aqk_gm, gamma_gm, *A_gm = outputs
  row, h, c = (lax.axis_index(name) for name in ("b", "h", "c"))
  wg = lax.axis_index("wg")
  here = (row, h, c)
  channels = pl.ds(wg * TILE, TILE)

  _fetch(keys_gm, rates_gm, s, row, h, c, wg)
  if rates_gm is None:
    _take_inputs(s, wg, tiles)
  else:
    _take_projections(s, wg, tiles, erase)
  g_parts = s["g_hi"].at[wg], s["g_lo"].at[wg]

  def load(name):
    return blocks.load(s[name].at[wg]).astype(jnp.float32)

  T, Aqk = _scores(load, s, g_parts, wg, scale, with_T=known_A_gm is None)
  with blocks.recomputed(s["kinds"].at[wg]):
    diagonal = (load("q") * scale * load("k")).sum(axis=1)
    r, c_ = blocks.iotas()
    Aqk += jnp.where(r == c_, blocks.of_rows(diagonal, (C, C)), 0.0)

  # The last warpgroup completes Aqk, the first one T. The parts to be added go
  # through the tiles of g, which is in g_hi and g_lo by now; each warpgroup
  # writes its own tile, which only it has read.
  last = tiles - 1
  if known_A_gm is None:

    @pl.when(wg == last)
    def _():
      s["g"].at[last][...] = T

  if tiles > 1:

    @pl.when(wg == 0)
    def _():
      s["g"].at[0][...] = Aqk

    # Each warpgroup reads the part that the other one stored.
    blocks.meet(s["met"], tiles)

  @pl.when(wg == last)
  def _():
    total = Aqk + blocks.load(s["g"].at[0]) if tiles > 1 else Aqk
    s["Aqk_out"][...] = total.astype(s["Aqk_out"].dtype)
    plgpu.commit_smem()  # the TMA store reads Aqk
    plgpu.copy_smem_to_gmem(s["Aqk_out"], Aqk_gm.at[here])

  @pl.when(wg == 0)
  def _():
    # All channels of gamma_C are there: _take_log_decay ends with `meet`.
    plgpu.copy_smem_to_gmem(s["gamma_C"], gamma_gm.at[here])
    if known_A_gm is not None:
      plgpu.copy_gmem_to_smem(known_A_gm.at[here], s["A"], s["A_loaded"])
      plgpu.barrier_wait(s["A_loaded"])  # for the others: `meet` below
    else:
      if tiles > 1:
        s["g"].at[last][...] = blocks.load(s["g"].at[last]) + T
      s["A"][...] = _inverse(s["g"].at[last], s).astype(s["A"].dtype)
      plgpu.commit_smem()  # the TMA store, and wgmma for Y, read A
      plgpu.copy_smem_to_gmem(s["A"], A_gm[0].at[here])

  with blocks.recomputed(s["kinds"].at[wg]):
    gamma = blocks.decay(blocks.prefix_span(), *g_parts)
    Kd = load("k") * blocks.decay(blocks.suffix_span(), *g_parts)
  # The buffers of k*x, q, k and b are reused for E, Qg, Kd and Y: their values
  # are in registers or used up, and no other warpgroup reads these tiles.
  E = s["kx_hi"].at[wg]
  E[...] = (gamma * load("b") * load("k")).astype(E.dtype)
  for name, x, out in (
    ("q", gamma * load("q") * scale, Qg_gm),
    ("k", Kd, Kd_gm),
  ):
    ref = s[name].at[wg]
    ref[...] = x.astype(ref.dtype)
    plgpu.commit_smem()  # the TMA store reads it; wgmma reads E
    plgpu.copy_smem_to_gmem(ref, out.at[(*here, pl.ds(0, C), channels)])
  blocks.meet(s["met"], tiles)  # A is there: only the first warpgroup made it
  Y_neg = -blocks.dot(blocks.zeros(), (s["A"], E))
  Y_out = s["b"].at[wg]
  Y_out[...] = Y_neg.astype(Y_out.dtype)
  plgpu.commit_smem()  # the TMA store reads Y
  plgpu.copy_smem_to_gmem(Y_out, Y_gm.at[(*here, pl.ds(0, C), channels)])
  plgpu.wait_smem_to_gmem(0)  # all stores, before the block ends


def _fetch(keys_gm, rates_gm, s, row, h, c, wg):
  """Loads a warpgroup's channels of q, k, b and g, and the kinds."""
  tokens, channels = (row, pl.ds(c * C, C)), pl.ds(wg * TILE, TILE)
  loaded = s["loaded"].at[wg]
  *keys_gm, kinds_gm = keys_gm
  # f, from which g is computed, has 16 bits, unlike the buffer of g. It goes to
  # the buffer of k*x, which is free until the first level.
  names = "q", "k", "b", "g" if rates_gm is None else "kx_hi"
  for name, source in zip(names, keys_gm, strict=True):
    plgpu.copy_gmem_to_smem(
      source.at[(*tokens, h, channels)], s[name].at[wg], loaded
    )
  plgpu.copy_gmem_to_smem(kinds_gm.at[tokens], s["kinds"].at[wg], loaded)
  if rates_gm is not None:
    plgpu.copy_gmem_to_smem(
      rates_gm.at[row, h, pl.ds(0, 2), channels], s["rates"].at[wg], loaded
    )
  plgpu.barrier_wait(loaded)


def _take_inputs(s, wg, tiles):
  """Masks q, k and b at padding, and splits g."""
  kinds = blocks.load_kinds(s["kinds"].at[wg])
  _take_log_decay(blocks.load(s["g"].at[wg]), kinds, s, wg, tiles)
  for name in "qkb":
    x = blocks.load(s[name].at[wg])
    x = jnp.where(kinds == blocks.PADDING, jnp.zeros_like(x), x)
    s[name].at[wg][...] = x


def _take_projections(s, wg, tiles, erase):
  """Like _take_inputs, and computes norms and gates (projected.py)."""
  kinds = blocks.load_kinds(s["kinds"].at[wg])
  f = blocks.load(s["kx_hi"].at[wg]).astype(jnp.float32)
  g, _, _ = projected.log_decay(f, s["rates"].at[wg])
  _take_log_decay(g, kinds, s, wg, tiles)

  def load(name):
    x = blocks.load(s[name].at[wg])
    x = jnp.where(kinds == blocks.PADDING, jnp.zeros_like(x), x)
    return x.astype(jnp.float32)

  def store(name, x):
    ref = s[name].at[wg]
    ref[...] = x.astype(ref.dtype)

  store("b", erase * projected.sigmoid(load("b")))
  for n, name in enumerate("qk"):
    x = load(name)
    projected.store_share(x * x, s["squares"].at[n], wg)
  blocks.meet(s["met"], tiles)  # a norm sums the squares of all warpgroups
  for n, name in enumerate("qk"):
    norm = projected.inverse_norm(s["squares"].at[n], tiles)
    store(name, load(name) * norm)


def _take_log_decay(g, kinds, s, wg, tiles):
  g = blocks.log_decay(g, kinds)
  blocks.store_split(g, s["g_hi"].at[wg], s["g_lo"].at[wg])
  channels = pl.ds(wg * TILE, TILE)

  def decay_of_chunk():
    s["gamma_C"].at[channels][...] = jnp.exp(g.sum(axis=0))

  blocks.in_turns(wg, tiles, s["met"], decay_of_chunk)


def _scores(load, s, g_parts, wg, scale, *, with_T):
  """This warpgroup's part of T and Aqk below the diagonal, level by level."""
  kx = s["kx_hi"].at[wg], s["kx_lo"].at[wg]
  dtype = kx[0].dtype

  def level(n, sums):
    with blocks.recomputed(s["kinds"].at[wg]):
      return add_level(blocks.level_half(n), *sums)

  def add_level(half, T, Aqk):
    second = (blocks.row_iota() & half) != 0
    x = blocks.decay(blocks.level_span(half), *g_parts)
    k = load("k") * x
    # The products of the level before have read the buffer: dot waits.
    blocks.store_split(jnp.where(second, 0.0, k), *kx)
    plgpu.commit_smem()  # wgmma reads k*x
    kx_T = tuple(blocks.transposed(ref) for ref in kx)
    pairs = blocks.level_pairs(half)

    def score(acc, a):
      a = blocks.split(jnp.where(second, a, 0.0), dtype)
      a_kx = blocks.dot(blocks.zeros(), *blocks.split_pairs(a, kx_T))
      return blocks.in_rows(acc + jnp.where(pairs, a_kx, 0.0))

    if with_T:
      T = score(T, load("b") * k)
    Aqk = score(Aqk, load("q") * scale * x)
    return T, Aqk

  return blocks.loop(
    blocks.LEVELS, level, (blocks.zeros(C, C), blocks.zeros(C, C))
  )


def _inverse(T_ref, s):
  """Inverse of I + T for a strictly lower triangular T, block by block.

  The inverse of a block of two rows is exactly I - T. Two neighbouring inverted
  blocks X merge into X - X T' X, where T' is the block of T below the first and
  left of the second. Operands are split, because entries of A may be large and
  cancel. T stays in shared memory to save registers.
  """
  dtype = s["X_hi"].dtype
  X_refs = s["X_hi"], s["X_lo"]
  W_refs = s["W_hi"], s["W_lo"]
  with blocks.recomputed(s["kinds"].at[0]):
    r, c = blocks.iotas()
    X = jnp.where(((r ^ c) == 1) & (r > c), -blocks.load(T_ref), 0.0)
    X = jnp.where(r == c, 1.0, X)

  def merge(n, X):
    with blocks.recomputed(s["kinds"].at[0]):
      return merge_level(n, X)

  def merge_level(n, X):
    r, c = blocks.iotas()
    half = lax.shift_left(jnp.int32(2), n)
    below = ((r ^ c) < 2 * half) & ((r & half) != 0) & ((c & half) == 0)
    blocks.store_split(X, *X_refs)
    plgpu.commit_smem()  # wgmma reads X
    minus_T = jnp.where(below, -blocks.load(T_ref), 0.0)
    minus_T = blocks.split(minus_T, dtype)
    W = blocks.dot(blocks.zeros(C, C), *blocks.split_pairs(minus_T, X_refs))
    blocks.store_split(W, *W_refs)
    plgpu.commit_smem()  # wgmma reads W
    X_parts = blocks.split(X, dtype)
    return blocks.in_rows(blocks.dot(X, *blocks.split_pairs(X_parts, W_refs)))

  return blocks.loop(blocks.LEVELS - 1, merge, blocks.in_rows(X))


def aot_cases() -> list[tuple[str, Callable, list[Any], dict[str, int]]]:
  """Representative calls: name, function, shapes of arguments, options."""

  def case(name, B, T, H, K, dtype="bfloat16", *, known_A=False, rates=False):
    key = jax.ShapeDtypeStruct((B, T, H, K), dtype)
    g = jax.ShapeDtypeStruct((B, T, H, K), dtype if rates else "float32")
    kinds = jax.ShapeDtypeStruct((B, T), "int32")
    extra = {}
    if known_A:
      extra["A"] = jax.ShapeDtypeStruct((B, H, T // C, C, C), dtype)
    if rates:
      extra["rates"] = jax.ShapeDtypeStruct((B, H, 2, K), "float32")

    def call(q, k, b, g, kinds, *values):
      options = dict(zip(extra, values, strict=True))
      return intra(q, k, b, g, kinds, K**-0.5, **options)

    shapes = [key, key, key, g, kinds, *extra.values()]
    return name, call, shapes, {"token_heads": B * T * H}

  return [
    case("intra", 8, 2048, 16, 128),
    case("intra, A given", 8, 2048, 16, 128, known_A=True),
    case("intra T=16384", 1, 16384, 16, 128),
    case("intra, A given, T=16384", 1, 16384, 16, 128, known_A=True),
    case("intra K=64", 8, 2048, 16, 64),
    case("intra, A given, K=64", 8, 2048, 16, 64, known_A=True),
    case("intra float16", 8, 2048, 16, 128, "float16"),
    case("intra, gates", 8, 2048, 16, 128, rates=True),
    case("intra, gates, A given", 8, 2048, 16, 128, known_A=True, rates=True),
    case("intra, gates, T=16384", 1, 16384, 16, 128, rates=True),
    case("intra, gates, K=64", 8, 2048, 16, 64, rates=True),
  ]
