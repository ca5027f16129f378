"""Kernel for the products within a chunk that do not need the state.

From q, k, b, g of C tokens (Eqs. 20-27, with decays as products over a binary
tree, README.md section 2):

  T_rs   = (b_r*k_r) . (exp(G_r - G_s) * k_s), r > s     A = (I + T)^-1
  Aqk_rs = scale q_r . (exp(G_r - G_s) * k_s), r >= s
  Y = A E, E = exp(G)*b*k     Qg = scale exp(G)*q     Kd = exp(G_C - G)*k

Four warpgroups share a chunk in two ways: each has 16 rows of q, k, b, g and
multiplies decays down them (chunk/rows.py), and each computes 32 columns of T
or of Aqk from what all of them store (chunk/scores.py). The backward pass runs
the same kernel with A given.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gdn2_jax.kernels import target
from gdn2_jax.pallas import blocks, inline
from gdn2_jax.pallas.blocks import C
from gdn2_jax.pallas.gdn2.chunk import inputs, inverse, scores
from gdn2_jax.pallas.gdn2.chunk.rows import (
  OPERAND_COLUMNS,
  WARPGROUPS,
  R,
  Rows,
  load_row,
)


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
  chunks, dtype = T // C, q.dtype
  wide = blocks.struct((B, H, chunks, C, K), dtype)
  square = blocks.struct((B, H, chunks, C, C), dtype)
  gamma_C = blocks.struct((B, H, chunks, K), jnp.float32)
  extra = [x for x in (rates, A) if x is not None]
  out_type = [wide, wide, wide, square, gamma_C]
  if A is None:
    out_type.append(square)
  scratch = _scratch(K, dtype, with_T=A is None, with_rates=rates is not None)
  names = tuple(scratch)

  def body(*refs):
    inputs_gm, refs = list(refs[:5]), list(refs[5:])
    rates_gm = None if rates is None else refs.pop(0)
    A_gm = None if A is None else refs.pop(0)
    outputs, refs = refs[: len(out_type)], refs[len(out_type) :]
    s = dict(zip(names, refs, strict=True))
    s |= dict(zip(("even", "E"), s["even"], strict=True))
    s["XQ"] = s["even"], s["odd"]
    s |= dict(zip(("f", "T", "Y"), s["T"], strict=True))
    _body(inputs_gm, rates_gm, A_gm, outputs, s, scale, erase_scale)

  body.__name__ = "gdn2_intra"
  out = plgpu.kernel(
    body,
    out_type=out_type,
    scratch_types=list(scratch.values()),
    grid=(B, H, chunks),
    grid_names=("b", "h", "c"),
    num_threads=WARPGROUPS,
    thread_name="wg",
    # Pallas would put a barrier around every row; see README.md section 9.
    compiler_params=plgpu.CompilerParams(
      approx_math=True, unsafe_no_auto_barriers=True
    ),
    interpret=target.interpret_params(),
  )(q, k, b, g, kinds, *extra)
  if A is None:
    return (*out[:4], out[5], out[4])
  return (*out[:4], A, out[4])


def _scratch(K, dtype, *, with_T, with_rates):
  """Shared memory and barriers by name; what a buffer holds later."""
  f32, f16 = jnp.float32, jnp.float16
  # E, A, T and what is merged. Of keys that are not normalised they may exceed
  # the range of float16, and then have that of the inputs; so has a given A.
  narrow = f16 if with_rates and with_T else dtype
  rows = plgpu.SMEM((C, K), dtype)  # without tiles: a warp reads a row
  scratch = {
    "q": rows,  # then Qg
    "k": rows,  # then Kd
    "b": rows,
    "g": plgpu.SMEM((C, K), f32),
    "kinds": plgpu.SMEM((C,), jnp.int32),
    # X and Q of even and of odd levels. Then E, after the last even one.
    "even": plgpu.RefUnion(
      blocks.tiled((2 * K, C), f16, OPERAND_COLUMNS),
      blocks.tiled((K, C), narrow, OPERAND_COLUMNS),
    ),
    "odd": blocks.tiled((2 * K, C), f16, OPERAND_COLUMNS),
    "totals": plgpu.SMEM((WARPGROUPS + 1, K), f32),
    "g_sums": plgpu.SMEM((WARPGROUPS, K), f32),
    "last_Aqk": plgpu.SMEM((1, K), f32),
    # f. Then -T, until it is inverted. Then Y, a part for each warpgroup.
    "T": plgpu.RefUnion(
      rows,
      blocks.tiled((C, C), f32, 32),
      blocks.tiled((WARPGROUPS, C, K // WARPGROUPS), dtype, K // WARPGROUPS),
    ),
    "Aqk": blocks.tiled((C, C), dtype, OPERAND_COLUMNS),
    "A": blocks.tiled((C, C), dtype, R),
    "loaded": plgpu.Barrier(num_arrivals=6 if with_rates else 5),
    "met": plgpu.Barrier(num_arrivals=WARPGROUPS),
    "A_loaded": plgpu.Barrier(),
  }
  if with_rates:
    scratch["rates"] = plgpu.SMEM((2, K), f32)
  elif dtype == jnp.bfloat16:
    scratch["undo"] = plgpu.SMEM((3, C), f32)
    scratch["is_scaled"] = plgpu.SMEM((C,), jnp.int32)
  if with_T:
    scratch |= inverse.scratch(narrow)
  else:
    scratch["parts"] = blocks.tiled((2 * C, C), f32, 32)
  return scratch


def _body(inputs_gm, rates_gm, known_A_gm, outputs, s, scale, erase):
  """The kernel's phases in their order."""
  here = tuple(lax.axis_index(name) for name in ("b", "h", "c"))
  wg = lax.axis_index("wg")
  with_T = known_A_gm is None
  untiled = "q", "k", "b", "g", "f", "totals", "g_sums", "last_Aqk"
  inline.declare_untiled(*(s[name] for name in untiled))

  # 1. Inputs, a warpgroup's rows of them.
  @pl.when(wg == 0)
  def _():
    inputs.fetch(inputs_gm, rates_gm, s, here)
    if not with_T:
      plgpu.copy_gmem_to_smem(known_A_gm.at[here], s["A"], s["A_loaded"])

  plgpu.barrier_wait(s["loaded"])
  masked, gates = inputs.needs_mask(s, wg), {}
  if rates_gm is not None:
    inputs.mask(s, wg, masked, "qkb")
    plgpu.commit_smem()  # other threads read what `mask` wrote
    inputs.take_norms(s, wg)
    gates["g"] = inputs.log_decays(s, wg, masked)
    gates["gate"] = functools.partial(inputs.erase_gate, scale=erase)
  else:
    inputs.mask(s, wg, masked)
    if "undo" in s:
      plgpu.commit_smem()  # other threads read what `mask` wrote
      inputs.scale_to_float16(s, wg)
  rows = Rows(s, wg, with_T=with_T, **gates)
  part = scores.part_of(wg, with_T=with_T)

  # 2. Levels. While tensor cores multiply a level, the rows go up to the next.
  entries = None
  rows.store_level(0)
  for n in range(scores.LAST):
    zero = scores.opaque_zero(s["kinds"])
    pair = scores.operands(s["XQ"][n % 2], part, zero)
    # All have stored level n, and all have read level n - 1, in the buffer that
    # level n + 1 goes to.
    blocks.meet(s["met"], WARPGROUPS)

    def next_level(n=n):
      rows.up(n)
      rows.store_level(n + 1)
      return rows.values

    new, rows.values = scores.product(*pair, next_level)
    entries = scores.select(n, new, entries, wg)
  zero = scores.opaque_zero(s["kinds"])
  pair = scores.operands(s["XQ"][scores.LAST % 2], part, zero)
  blocks.meet(s["met"], WARPGROUPS)  # as in the loop
  values = rows.values

  def results():
    rows.values = values
    rows.up(scores.LAST)
    rows.store_results(scale)
    if "undo" in s:
      pl.when(inputs.is_scaled(s, wg))(rows.undo_scaling)

  @pl.when(part.columns == 0)
  def _():
    new, _ = scores.product(*pair, results)
    last = scores.select(scores.LAST, new, entries, wg)
    scores.store(s, part, scores.join(last), scale)

  @pl.when(part.columns != 0)
  def _():
    results()
    scores.store(s, part, scores.join(entries), scale)

  # 3. The inverse. T, Aqk or its parts, E, Qg, Kd and the sums of g are there.
  blocks.meet(s["met"], WARPGROUPS)
  Y_gm, Qg_gm, Kd_gm, Aqk_gm, gamma_gm, *A_gm = outputs
  # Not a condition that the compiler has kept since the start.
  role = wg + scores.opaque_zero(s["kinds"])

  @pl.when(role == 0)
  def _():
    if with_T:
      inverse.invert(s)
      plgpu.commit_smem()  # the TMA store reads A
      plgpu.copy_smem_to_gmem(s["A"], A_gm[0].at[here])
    else:
      plgpu.barrier_wait(s["A_loaded"])  # for the others: `meet` below

  @pl.when(role == 1)
  def _():
    total = load_row(s["g_sums"], 0)
    for n in range(1, WARPGROUPS):
      total += load_row(s["g_sums"], n)
    blocks.store_untiled(gamma_gm.at[here], jnp.exp(total))

  @pl.when(role == 3)
  def _():
    plgpu.copy_smem_to_gmem(s["q"], Qg_gm.at[here])
    plgpu.copy_smem_to_gmem(s["k"], Kd_gm.at[here])
    if with_T:
      plgpu.copy_smem_to_gmem(s["Aqk"], Aqk_gm.at[here])

  if not with_T:
    pl.when(part.index == 0)(lambda: scores.add_parts(s, part, scale))

  # 4. Y, a quarter of the channels each. A is there, and T is not needed.
  blocks.meet(s["met"], WARPGROUPS)
  if not with_T:

    @pl.when(role == 3)
    def _():
      plgpu.copy_smem_to_gmem(s["Aqk"], Aqk_gm.at[here])

  part = s["Y"].at[wg]
  width = part.shape[-1]
  channels = pl.ds(wg * width, width)
  E = s["E"].at[channels]
  A = blocks.load(s["A"])
  if A.dtype != E.dtype:
    A = A.astype(jnp.float32).astype(E.dtype)
  Y_neg = blocks.dot(blocks.zeros(C, width), (A, E.transpose((1, 0))))
  part[...] = Y_neg.astype(part.dtype)
  plgpu.commit_smem()  # the TMA store reads Y
  plgpu.copy_smem_to_gmem(part, Y_gm.at[(*here, pl.ds(0, C), channels)])
  plgpu.wait_smem_to_gmem(0)  # all stores, before the block ends


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
    limits = {"token_heads": B * T * H, "max_registers": 128}
    return name, call, shapes, limits

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
