"""Backward kernel that carries the gradient of the state, in reverse order.

  dR = Aqk^T dO + Kd dS        dS <- gamma_C dS + Qg^T dO - Y^T dR

This is scan.py with the roles of its operands exchanged, and with the same
blocks. It stores the gradients of the states at the chunk ends; from these
intra_grad.py computes all other gradients, for all chunks in parallel.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gdn2_jax.pallas import blocks
from gdn2_jax.pallas.blocks import TILE, C
from gdn2_jax.pallas.gdn2 import scan
from gdn2_jax.pallas.gdn2.scan import section_of, tiles_per_block

_STAGES = 2
_MIN_SECTIONS = 8  # see scan.section_count


def section_count(B: int, H: int, V: int, chunks: int) -> int:
  """Sections that run in parallel backward, see scan.section_count."""
  return scan.section_count(B, H, V, chunks, _MIN_SECTIONS)


def scan_grad(Y_neg, Qg, Kd, Aqk, gamma_C, do, dstate, *, sections=1):
  """Runs the kernel.

  Args:
    Y_neg: -Y [B, H, NC, C, K], 16-bit, from intra.
    Qg: [B, H, NC, C, K].
    Kd: [B, H, NC, C, K].
    Aqk: [B, H, NC, C, C].
    gamma_C: [B, H, NC, K], float32.
    do: [B, T, H, V], 16-bit, V a multiple of 64.
    dstate: Gradient of the final state [B, H, K, V], float32; those of the end
      states [B, H, sections, K, V] of several sections.
    sections: Sections that run in parallel.

  Returns:
    Gradients of the states at the chunk ends [B, H, NC, K, V] in the dtype of
    do, and of the initial state [B, H, K, V], float32.
  """
  B, H, chunks, _, K = Y_neg.shape
  V = do.shape[-1]
  outputs = {
    "dstates": blocks.struct((B, H, chunks, K, V), do.dtype),
    "dinitial": blocks.struct((B, H, K, V), jnp.float32),
  }
  keys = {"Y": Y_neg, "Qg": Qg, "Kd": Kd, "Aqk": Aqk, "gamma_C": gamma_C}
  present = range(sections)
  return _call("gdn2_scan_grad", keys, do, dstate, outputs, sections, present)


def section_start_gradients(
  Y_neg, Qg, Kd, Aqk, gamma_C, do, dstate, *, sections
):
  """Runs the kernel without dstates, over all sections but the first.

  The arguments are those of scan_grad. The last section has the gradient
  `dstate` at its end, the others zeros. Returns the gradients of their start
  states [B, H, sections - 1, K, V], float32.
  """
  B, H, _, _, K = Y_neg.shape
  shape = (B, H, sections - 1, K, do.shape[-1])
  outputs = {"dstarts": blocks.struct(shape, jnp.float32)}
  keys = {"Y": Y_neg, "Qg": Qg, "Kd": Kd, "Aqk": Aqk, "gamma_C": gamma_C}
  present = range(1, sections)
  (dstarts,) = _call(
    "gdn2_section_dstarts", keys, do, dstate, outputs, sections, present
  )
  return dstarts


def _call(name, keys, do, dstate, outputs, sections, present):
  """Calls the kernel for the sections that are `present`."""
  B, _, H, V = do.shape
  _, _, chunks, _, K = keys["Y"].shape
  tiles = tiles_per_block(B * len(present), H, V)
  dtype = do.dtype
  wide = blocks.smem((_STAGES, C, K), dtype)
  values = blocks.smem((tiles, C, TILE), dtype)
  scratch = {
    "Y": wide,
    "Qg": wide,
    "Kd": wide,
    "Aqk": blocks.smem((_STAGES, C, C), dtype),
    "gamma_C": plgpu.SMEM((_STAGES, K), jnp.float32),
    "dO": blocks.smem((_STAGES, tiles, C, TILE), dtype),
    "dR_hi": values,
    "dR_lo": values,
    "dS": blocks.smem((tiles, K, TILE), dtype),
    "keys_loaded": plgpu.Barrier(num_arrivals=5, num_barriers=_STAGES),
    "dO_loaded": plgpu.Barrier(num_barriers=_STAGES * tiles),
    "met": plgpu.Barrier(num_arrivals=tiles),
  }

  def body(*refs):
    refs = iter(refs)
    keys_gm, gradients_gm, outputs_gm, s = (
      dict(zip(names, refs, strict=False))
      for names in (keys, ("dO", "dstate"), outputs, scratch)
    )
    section = section_of(lax.axis_index("b"), chunks, sections, present)
    _body(keys_gm, gradients_gm, outputs_gm, s, section, tiles)

  return blocks.call(
    name,
    body,
    list(outputs.values()),
    scratch_types=list(scratch.values()),
    grid=(B * len(present), H, V // TILE // tiles),
    grid_names=("b", "h", "j"),
    num_threads=tiles,
    thread_name="wg",
  )(*keys.values(), do, dstate)


def _body(keys_gm, gradients_gm, outputs, s, section, tiles):
  row, chunks = section.row, section.chunks
  h, j, wg = (lax.axis_index(name) for name in ("h", "j", "wg"))
  values = pl.ds((j * tiles + wg) * TILE, TILE)
  dR_refs = s["dR_hi"].at[wg], s["dR_lo"].at[wg]
  dS_ref = s["dS"].at[wg]
  K = dS_ref.shape[0]

  def place(n):
    return section.first + chunks - 1 - n

  def fetch_keys(n):
    slot, c = lax.rem(n, _STAGES), place(n)
    for name, source in keys_gm.items():
      plgpu.copy_gmem_to_smem(
        source.at[row, h, c], s[name].at[slot], s["keys_loaded"].at[slot]
      )

  def fetch_dO(n):
    slot, c = lax.rem(n, _STAGES), place(n)
    plgpu.copy_gmem_to_smem(
      gradients_gm["dO"].at[row, pl.ds(c * C, C), h, values],
      s["dO"].at[slot, wg],
      s["dO_loaded"].at[slot * tiles + wg],
    )

  @pl.when(wg == 0)
  def _():
    fetch_keys(jnp.int32(0))

  fetch_dO(jnp.int32(0))

  def chunk(n, dS):
    slot = lax.rem(n, _STAGES)
    # The TMA store of the last dS must have read the buffer.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    dS_ref[...] = dS.astype(dS_ref.dtype)
    # Commits dS, and ensures that all warpgroups have finished the last chunk,
    # whose slots the next fetches refill.
    blocks.meet(s["met"], tiles)
    if "dstates" in outputs:
      dstates = outputs["dstates"].at[row, h, place(n), pl.ds(0, K), values]
      plgpu.copy_smem_to_gmem(dS_ref, dstates)

    @pl.when((wg == 0) & (n + 1 < chunks))
    def _():
      fetch_keys(n + 1)

    @pl.when(n + 1 < chunks)
    def _():
      fetch_dO(n + 1)

    plgpu.barrier_wait(s["dO_loaded"].at[slot * tiles + wg])
    plgpu.barrier_wait(s["keys_loaded"].at[slot])
    Y, Qg, Kd, Aqk = (s[name].at[slot] for name in ("Y", "Qg", "Kd", "Aqk"))
    dO = s["dO"].at[slot, wg]
    dR = blocks.dot(blocks.zeros(), (blocks.transposed(Aqk), dO), (Kd, dS_ref))
    blocks.store_split(dR, *dR_refs)
    plgpu.commit_smem()  # wgmma reads dR
    gamma_C = plgpu.load(s["gamma_C"].at[slot], layout=blocks.ROWS.reduce(1))
    dS = dS * blocks.of_rows(gamma_C, (K, TILE))
    Y_T = blocks.transposed(Y)
    return blocks.in_rows(
      blocks.dot(
        dS,
        (blocks.transposed(Qg), dO),
        (Y_T, dR_refs[0]),
        (Y_T, dR_refs[1]),
      )
    )

  here = (pl.ds(0, K), values)
  end = (row, h, *here)
  if "dstarts" in outputs:
    is_last = blocks.everywhere(section.is_last, (K, TILE))
    dS = blocks.load_global(gradients_gm["dstate"].at[end])
    dS = blocks.loop(chunks, chunk, jnp.where(is_last, dS, 0.0))
    dstarts = outputs["dstarts"].at[(row, h, section.index - 1, *here)]
    blocks.store_untiled(dstarts, dS)
    return
  if section.index is not None:
    end = (row, h, section.index, *here)
  dS = blocks.load_global(gradients_gm["dstate"].at[end])
  dS = blocks.loop(chunks, chunk, dS)

  def store_initial():
    blocks.store_untiled(outputs["dinitial"].at[(row, h, *here)], dS)

  if section.index is None:
    store_initial()
  else:
    pl.when(section.index == 0)(store_initial)
  plgpu.wait_smem_to_gmem(0)  # all stores, before the block ends


def aot_cases() -> list[tuple[str, Callable, list[Any], dict[str, int]]]:
  """Representative calls: name, function, shapes of arguments, options."""
  struct = jax.ShapeDtypeStruct

  def case(name, B, T, H, K, V, dtype="bfloat16", sections=1):
    wide = struct((B, H, T // C, C, K), dtype)
    square = struct((B, H, T // C, C, C), dtype)
    gamma_C = struct((B, H, T // C, K), "float32")
    value = struct((B, T, H, V), dtype)
    ends = () if sections == 1 else (sections,)
    state = struct((B, H, *ends, K, V), "float32")

    def call(*args):
      return scan_grad(*args, sections=sections)

    shapes = [wide, wide, wide, square, gamma_C, value, state]
    return name, call, shapes, {"token_heads": B * T * H}

  return [
    case("scan_grad", 8, 2048, 16, 128, 128),
    case("scan_grad T=16384", 1, 16384, 16, 128, 128),
    case("scan_grad T=16384, sections", 1, 16384, 16, 128, 128, sections=8),
    case("scan_grad K=64 V=64", 8, 2048, 16, 64, 64),
    case("scan_grad float16", 8, 2048, 16, 128, 128, "float16"),
  ]
