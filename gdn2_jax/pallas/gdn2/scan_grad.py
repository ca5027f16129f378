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
from gdn2_jax.pallas.gdn2.scan import tiles_per_block

_STAGES = 2


def scan_grad(Y_neg, Qg, Kd, Aqk, gamma_C, do, dstate):
  """Runs the kernel.

  Args:
    Y_neg: -Y [B, H, NC, C, K], 16-bit, from intra.
    Qg: [B, H, NC, C, K].
    Kd: [B, H, NC, C, K].
    Aqk: [B, H, NC, C, C].
    gamma_C: [B, H, NC, K], float32.
    do: [B, T, H, V], 16-bit, V a multiple of 64.
    dstate: Gradient of the final state [B, H, K, V], float32.

  Returns:
    Gradients of the states at the chunk ends [B, H, NC, K, V] in the dtype of
    do, and of the initial state [B, H, K, V], float32.
  """
  B, _, H, V = do.shape
  chunks, K = Y_neg.shape[2], Y_neg.shape[-1]
  tiles = tiles_per_block(B, H, V)
  dtype = do.dtype
  out_type = [
    blocks.struct((B, H, chunks, K, V), dtype),
    blocks.struct(dstate.shape, jnp.float32),
  ]
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
  names = tuple(scratch)

  def body(*refs):
    inputs, outputs, refs = refs[:7], refs[7:9], refs[9:]
    s = dict(zip(names, refs, strict=True))
    _body(inputs, outputs, s, chunks=chunks, tiles=tiles)

  return blocks.call(
    "gdn2_scan_grad",
    body,
    out_type,
    scratch_types=list(scratch.values()),
    grid=(B, H, V // TILE // tiles),
    grid_names=("b", "h", "j"),
    num_threads=tiles,
    thread_name="wg",
  )(Y_neg, Qg, Kd, Aqk, gamma_C, do, dstate)


def _body(inputs, outputs, s, *, chunks, tiles):
  *keys_gm, do_gm, dfinal_gm = inputs
  dstates_gm, dinitial_gm = outputs
  row, h, j = (lax.axis_index(name) for name in ("b", "h", "j"))
  wg = lax.axis_index("wg")
  values = pl.ds((j * tiles + wg) * TILE, TILE)
  dR_refs = s["dR_hi"].at[wg], s["dR_lo"].at[wg]
  dS_ref = s["dS"].at[wg]
  K = dS_ref.shape[0]

  def fetch_keys(n):
    slot, c = lax.rem(n, _STAGES), chunks - 1 - n
    names = ("Y", "Qg", "Kd", "Aqk", "gamma_C")
    for name, source in zip(names, keys_gm, strict=True):
      plgpu.copy_gmem_to_smem(
        source.at[row, h, c], s[name].at[slot], s["keys_loaded"].at[slot]
      )

  def fetch_dO(n):
    slot, c = lax.rem(n, _STAGES), chunks - 1 - n
    plgpu.copy_gmem_to_smem(
      do_gm.at[row, pl.ds(c * C, C), h, values],
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
    plgpu.copy_smem_to_gmem(
      dS_ref, dstates_gm.at[row, h, chunks - 1 - n, pl.ds(0, K), values]
    )

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

  here = (row, h, pl.ds(0, K), values)
  dS = blocks.loop(chunks, chunk, blocks.load_global(dfinal_gm.at[here]))
  blocks.store_global(dinitial_gm.at[here], dS)
  plgpu.wait_smem_to_gmem(0)  # all stores, before the block ends


def aot_cases() -> list[tuple[str, Callable, list[Any], dict[str, int]]]:
  """Representative calls: name, function, shapes of arguments, options."""

  def case(name, B, T, H, K, V, dtype="bfloat16"):
    struct = jax.ShapeDtypeStruct
    wide = struct((B, H, T // C, C, K), dtype)
    square = struct((B, H, T // C, C, C), dtype)
    gamma_C = struct((B, H, T // C, K), "float32")
    value = struct((B, T, H, V), dtype)
    state = struct((B, H, K, V), "float32")
    shapes = [wide, wide, wide, square, gamma_C, value, state]
    return name, scan_grad, shapes, {"token_heads": B * T * H}

  return [
    case("scan_grad", 8, 2048, 16, 128, 128),
    case("scan_grad T=16384", 1, 16384, 16, 128, 128),
    case("scan_grad K=64 V=64", 8, 2048, 16, 64, 64),
    case("scan_grad float16", 8, 2048, 16, 128, 128, "float16"),
  ]
