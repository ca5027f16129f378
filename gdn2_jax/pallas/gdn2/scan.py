"""Forward kernel that carries the state from chunk to chunk.

  R = A Z - Y S,  Z = w*v        O = Qg S + Aqk R        S <- gamma_C S + Kd^T R

Y, Qg, Kd, Aqk, A and gamma_C come from intra.py. One warpgroup holds a [K, 64]
slice of a head's state in registers for the whole sequence. Two warpgroups
share a block and the key-side operands if enough blocks remain to fill the GPU.
If that leaves most of the GPU idle, a long sequence is cut into sections, which
run in parallel from start states that sections.py computes.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gdn2_jax.pallas import blocks, projected
from gdn2_jax.pallas.blocks import TILE, C

_MULTIPROCESSORS = 132  # of an H100
_STAGES = 2  # buffers of key-side operands
_MIN_SECTIONS = 5  # with fewer a scan of the whole is as fast by the model
_MIN_SECTION = 8  # chunks
_MIN_CHUNKS = 64  # of a sequence that is cut


def tiles_per_block(B: int, H: int, V: int) -> int:
  """Value tiles of one block, one per warpgroup."""
  tiles = V // TILE
  enough = B * H * tiles >= 2 * _MULTIPROCESSORS * 3 // 4
  return 2 if tiles % 2 == 0 and enough else 1


def section_count(
  B: int, H: int, V: int, chunks: int, least: int = _MIN_SECTIONS
) -> int:
  """Sections that a sequence is cut into: 1, or as many as fill the GPU.

  All have ceil(chunks / count) chunks, except that the last may have fewer. At
  fewer than `least` the passes over the chunks take longer than they save.
  """
  fill = 2 * _MULTIPROCESSORS // (B * H * (V // TILE))
  # The states pass from section to section one after another. Such a step takes
  # about a third of the time of a chunk in all passes together (README), so the
  # optimum is near sqrt(3 * chunks).
  most = min(fill, chunks // _MIN_SECTION, math.isqrt(2 * chunks))
  if most < least or chunks < _MIN_CHUNKS:
    return 1
  return pl.cdiv(chunks, pl.cdiv(chunks, most))


class Section(NamedTuple):
  """Part of a sequence that a block works on.

  Attributes:
    row: Batch row.
    index: Number of the section; None if the sequence is not cut.
    first: First chunk.
    chunks: Number of chunks.
    is_last: The sequence ends here.
  """

  row: Any
  index: Any
  first: Any
  chunks: Any
  is_last: Any


def section_of(block: Any, chunks: int, count: int, present: range) -> Section:
  """Section of a block.

  block: Index along a grid axis of batch rows times the sections `present`.
  chunks: Number of chunks of a sequence.
  count: Number of its sections.
  """
  if count == 1:
    return Section(block, None, 0, chunks, True)
  size = jnp.int32(len(present))
  index = lax.rem(block, size) + present.start
  length = pl.cdiv(chunks, count)
  first = index * length
  if count - 1 in present and chunks < count * length:
    length = jnp.minimum(length, chunks - first)
  return Section(lax.div(block, size), index, first, length, index == count - 1)


def scan(
  Y_neg,
  Qg,
  Kd,
  Aqk,
  A,
  gamma_C,
  v,
  w,
  state,
  *,
  save,
  is_projected=False,
  sections=1,
):
  """Runs the kernel.

  Args:
    Y_neg: -Y [B, H, NC, C, K], 16-bit, from intra.
    Qg: [B, H, NC, C, K].
    Kd: [B, H, NC, C, K].
    Aqk: [B, H, NC, C, C].
    A: [B, H, NC, C, C].
    gamma_C: [B, H, NC, K], float32.
    v: [B, T, H, V], in the dtype of Y_neg; V a multiple of 64.
    w: [B, T, H, V], in the dtype of v.
    state: [B, H, K, V], float32; the start states [B, H, sections, K, V] of
      several sections.
    save: Return the states at the chunk starts.
    is_projected: w is before the sigmoid (projected.py).
    sections: Sections that run in parallel.

  Returns:
    o [B, T, H, V] in the dtype of v, the final state [B, H, K, V], and the
    states [B, H, NC, K, V] in the dtype of v, or None.
  """
  B, _, H, V = v.shape
  chunks, K = Y_neg.shape[2], Y_neg.shape[-1]
  outputs = {
    "o": blocks.struct(v.shape, v.dtype),
    "final": blocks.struct((B, H, K, V), jnp.float32),
  }
  if save:
    outputs["states"] = blocks.struct((B, H, chunks, K, V), v.dtype)
  keys = {"Y": Y_neg, "Qg": Qg, "Kd": Kd, "Aqk": Aqk, "A": A}
  o, state, *states = _call(
    "gdn2_scan",
    keys | {"gamma_C": gamma_C},
    (v, w, state),
    outputs,
    sections,
    range(sections),
    is_projected,
  )
  return o, state, states[0] if states else None


def section_ends(
  Y_neg, Kd, A, gamma_C, v, w, state, *, sections, is_projected=False
):
  """Runs the kernel without outputs, over all sections but the last.

  The arguments are those of scan. Section 0 starts from `state`, the others
  from zeros. Returns the states after them [B, H, sections - 1, K, V], float32.
  """
  B, _, H, V = v.shape
  shape = (B, H, sections - 1, Y_neg.shape[-1], V)
  (ends,) = _call(
    "gdn2_section_ends",
    {"Y": Y_neg, "Kd": Kd, "A": A, "gamma_C": gamma_C},
    (v, w, state),
    {"ends": blocks.struct(shape, jnp.float32)},
    sections,
    range(sections - 1),
    is_projected,
  )
  return ends


def _call(name, keys, values, outputs, sections, present, is_projected):
  """Calls the kernel for the sections that are `present`."""
  B, _, H, V = values[0].shape
  _, _, chunks, _, K = keys["Y"].shape
  tiles = tiles_per_block(B * len(present), H, V)
  dtype = values[0].dtype
  tile = blocks.smem((tiles, C, TILE), dtype)
  scratch = {
    name: blocks.smem((_STAGES, C, x.shape[-1]), dtype)
    for name, x in keys.items()
    if name != "gamma_C"
  }
  scratch |= {
    "gamma_C": plgpu.SMEM((_STAGES, K), jnp.float32),
    "Z_hi": tile,  # v, then Z
    "Z_lo": tile,  # w, then Z
    "R_hi": tile,
    "R_lo": tile,
    "S": blocks.smem((tiles, K, TILE), dtype),  # then O
    "keys_loaded": plgpu.Barrier(num_arrivals=len(keys), num_barriers=_STAGES),
    "values_loaded": plgpu.Barrier(num_arrivals=2, num_barriers=tiles),
    "met": plgpu.Barrier(num_arrivals=tiles),
  }

  def body(*refs):
    refs = iter(refs)
    keys_gm, values_gm, outputs_gm, s = (
      dict(zip(names, refs, strict=False))
      for names in (keys, ("v", "w", "state"), outputs, scratch)
    )
    section = section_of(lax.axis_index("b"), chunks, sections, present)
    _body(keys_gm, values_gm, outputs_gm, s, section, tiles, is_projected)

  return blocks.call(
    name,
    body,
    list(outputs.values()),
    scratch_types=list(scratch.values()),
    grid=(B * len(present), H, V // TILE // tiles),
    grid_names=("b", "h", "j"),
    num_threads=tiles,
    thread_name="wg",
  )(*keys.values(), *values)


def _body(keys_gm, values_gm, outputs, s, section, tiles, is_projected):
  row, first, chunks = section.row, section.first, section.chunks
  h, j, wg = (lax.axis_index(name) for name in ("h", "j", "wg"))
  values = pl.ds((j * tiles + wg) * TILE, TILE)
  values_loaded = s["values_loaded"].at[wg]
  Z = s["Z_hi"].at[wg], s["Z_lo"].at[wg]
  R_refs = s["R_hi"].at[wg], s["R_lo"].at[wg]
  S_ref = s["S"].at[wg]
  O_ref = S_ref.at[pl.ds(0, C)]
  K = S_ref.shape[0]

  def fetch_keys(c):
    slot = lax.rem(c, _STAGES)
    for name, source in keys_gm.items():
      plgpu.copy_gmem_to_smem(
        source.at[row, h, first + c],
        s[name].at[slot],
        s["keys_loaded"].at[slot],
      )

  def tokens(c):
    return pl.ds((first + c) * C, C)

  def fetch_values(c):
    for name, ref in (("v", Z[0]), ("w", Z[1])):
      source = values_gm[name].at[row, tokens(c), h, values]
      plgpu.copy_gmem_to_smem(source, ref, values_loaded)

  @pl.when(wg == 0)
  def _():
    fetch_keys(jnp.int32(0))

  fetch_values(jnp.int32(0))

  def chunk(c, S):
    slot = lax.rem(c, _STAGES)
    # S overwrites the output of the last chunk, which its TMA store must have
    # read.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    S_ref[...] = S.astype(S_ref.dtype)
    # Commits S, and ensures that all warpgroups have finished the last chunk,
    # whose slot the next fetch refills.
    blocks.meet(s["met"], tiles)

    @pl.when((wg == 0) & (c + 1 < chunks))
    def _():
      fetch_keys(c + 1)

    if "states" in outputs:
      states = outputs["states"].at[row, h, first + c, pl.ds(0, K), values]
      plgpu.copy_smem_to_gmem(S_ref, states)
    plgpu.barrier_wait(values_loaded)
    v, w = (blocks.load(ref).astype(jnp.float32) for ref in Z)
    if is_projected:
      w = projected.sigmoid(w)
    blocks.store_split(w * v, *Z)  # in place of v and w
    plgpu.commit_smem()  # wgmma reads Z
    plgpu.barrier_wait(s["keys_loaded"].at[slot])
    keys = {name: s[name].at[slot] for name in keys_gm}
    R = blocks.dot(
      blocks.zeros(),
      (keys["A"], Z[0]),
      (keys["A"], Z[1]),
      (keys["Y"], S_ref),
    )
    blocks.store_split(R, *R_refs)
    plgpu.commit_smem()  # wgmma reads R

    # Z has been read, and the loads of v and w were committed: refill.
    @pl.when(c + 1 < chunks)
    def _():
      fetch_values(c + 1)

    if "o" in outputs:
      o = blocks.dot(
        blocks.zeros(),
        (keys["Qg"], S_ref),
        (keys["Aqk"], R_refs[0]),
        (keys["Aqk"], R_refs[1]),
      )
      # O overwrites S: the TMA store that saves S must have read it.
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      O_ref[...] = o.astype(O_ref.dtype)
      plgpu.commit_smem()  # the TMA store reads O
      plgpu.copy_smem_to_gmem(O_ref, outputs["o"].at[row, tokens(c), h, values])
    gamma_C = plgpu.load(keys["gamma_C"], layout=blocks.ROWS.reduce(1))
    S = S * blocks.of_rows(gamma_C, (K, TILE))
    Kd_T = blocks.transposed(keys["Kd"])
    return blocks.in_rows(blocks.dot(S, (Kd_T, R_refs[0]), (Kd_T, R_refs[1])))

  here = (pl.ds(0, K), values)
  start = (row, h, *here)
  if "ends" in outputs:
    is_first = blocks.everywhere(section.index == 0, (K, TILE))
    S = blocks.load_global(values_gm["state"].at[start])
    S = blocks.loop(chunks, chunk, jnp.where(is_first, S, 0.0))
    ends = outputs["ends"].at[(row, h, section.index, *here)]
    blocks.store_untiled(ends, S)
    return
  if section.index is not None:
    start = (row, h, section.index, *here)
  S = blocks.load_global(values_gm["state"].at[start])
  S = blocks.loop(chunks, chunk, S)

  def store_final():
    blocks.store_untiled(outputs["final"].at[(row, h, *here)], S)

  if section.is_last is True:
    store_final()
  else:
    pl.when(section.is_last)(store_final)
  plgpu.wait_smem_to_gmem(0)  # all stores, before the block ends


def aot_cases() -> list[tuple[str, Callable, list[Any], dict[str, int]]]:
  """Representative calls: name, function, shapes of arguments, options."""

  def case(name, B, T, H, K, V, dtype="bfloat16", **options):
    struct = jax.ShapeDtypeStruct
    wide = struct((B, H, T // C, C, K), dtype)
    square = struct((B, H, T // C, C, C), dtype)
    gamma_C = struct((B, H, T // C, K), "float32")
    value = struct((B, T, H, V), dtype)
    sections = options.get("sections", 1)
    starts = () if sections == 1 else (sections,)
    state = struct((B, H, *starts, K, V), "float32")

    def call(*args):
      return scan(*args, **({"save": False} | options))

    keys = [wide, wide, wide, square, square, gamma_C]
    shapes = [*keys, value, value, state]
    return name, call, shapes, {"token_heads": B * T * H}

  return [
    case("scan", 8, 2048, 16, 128, 128),
    case("scan, states saved", 8, 2048, 16, 128, 128, save=True),
    case("scan T=16384", 1, 16384, 16, 128, 128),
    case("scan T=16384, sections", 1, 16384, 16, 128, 128, sections=8),
    case("scan K=64 V=64", 8, 2048, 16, 64, 64, save=True),
    case("scan float16", 8, 2048, 16, 128, 128, "float16", save=True),
    case("scan, gates", 8, 2048, 16, 128, 128, is_projected=True),
    case(
      *("scan, gates, states saved", 8, 2048, 16, 128, 128),
      save=True,
      is_projected=True,
    ),
  ]
