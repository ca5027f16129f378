"""Forward kernel that carries the state from chunk to chunk.

  R = A Z - Y S,  Z = w*v        O = Qg S + Aqk R        S <- gamma_C S + Kd^T R

Y, Qg, Kd, Aqk, A and gamma_C come from intra.py. One warpgroup holds a [K, 64]
slice of a head's state in registers for the whole sequence. Two warpgroups
share a block and the key-side operands if enough blocks remain to fill the GPU.
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

_MULTIPROCESSORS = 132  # of an H100
_STAGES = 2  # buffers of key-side operands


def tiles_per_block(B: int, H: int, V: int) -> int:
  """Value tiles of one block, one per warpgroup."""
  tiles = V // TILE
  enough = B * H * tiles >= 2 * _MULTIPROCESSORS * 3 // 4
  return 2 if tiles % 2 == 0 and enough else 1


def scan(
  Y_neg, Qg, Kd, Aqk, A, gamma_C, v, w, state, *, save, is_projected=False
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
    state: [B, H, K, V], float32.
    save: Return the states at the chunk starts.
    is_projected: w is before the sigmoid (projected.py).

  Returns:
    o [B, T, H, V] in the dtype of v, the final state [B, H, K, V], and the
    states [B, H, NC, K, V] in the dtype of v, or None.
  """
  B, _, H, V = v.shape
  chunks, K = Y_neg.shape[2], Y_neg.shape[-1]
  tiles = tiles_per_block(B, H, V)
  dtype = v.dtype
  out_type = [
    blocks.struct(v.shape, dtype),
    blocks.struct(state.shape, jnp.float32),
  ]
  if save:
    out_type.append(blocks.struct((B, H, chunks, K, V), dtype))
  wide = blocks.smem((_STAGES, C, K), dtype)
  square = blocks.smem((_STAGES, C, C), dtype)
  values = blocks.smem((tiles, C, TILE), dtype)
  scratch = {
    "Y": wide,
    "Qg": wide,
    "Kd": wide,
    "Aqk": square,
    "A": square,
    "gamma_C": plgpu.SMEM((_STAGES, K), jnp.float32),
    "Z_hi": values,  # v, then Z
    "Z_lo": values,  # w, then Z
    "R_hi": values,
    "R_lo": values,
    "S": blocks.smem((tiles, K, TILE), dtype),  # then O
    "keys_loaded": plgpu.Barrier(num_arrivals=6, num_barriers=_STAGES),
    "values_loaded": plgpu.Barrier(num_arrivals=2, num_barriers=tiles),
    "met": plgpu.Barrier(num_arrivals=tiles),
  }
  names = tuple(scratch)

  def body(*refs):
    inputs, refs = refs[:9], refs[9:]
    outputs, refs = refs[: len(out_type)], refs[len(out_type) :]
    s = dict(zip(names, refs, strict=True))
    _body(inputs, outputs, s, chunks, tiles, is_projected)

  o, state, *states = blocks.call(
    "gdn2_scan",
    body,
    out_type,
    scratch_types=list(scratch.values()),
    grid=(B, H, V // TILE // tiles),
    grid_names=("b", "h", "j"),
    num_threads=tiles,
    thread_name="wg",
  )(Y_neg, Qg, Kd, Aqk, A, gamma_C, v, w, state)
  return o, state, states[0] if states else None


def _body(inputs, outputs, s, chunks, tiles, is_projected):
  *keys_gm, v_gm, w_gm, state_gm = inputs
  o_gm, final_gm, *states_gm = outputs
  row, h, j = (lax.axis_index(name) for name in ("b", "h", "j"))
  wg = lax.axis_index("wg")
  values = pl.ds((j * tiles + wg) * TILE, TILE)
  values_loaded = s["values_loaded"].at[wg]
  Z = s["Z_hi"].at[wg], s["Z_lo"].at[wg]
  R_refs = s["R_hi"].at[wg], s["R_lo"].at[wg]
  S_ref = s["S"].at[wg]
  O_ref = S_ref.at[pl.ds(0, C)]
  K = S_ref.shape[0]

  def fetch_keys(c):
    slot = lax.rem(c, _STAGES)
    names = ("Y", "Qg", "Kd", "Aqk", "A", "gamma_C")
    for name, source in zip(names, keys_gm, strict=True):
      plgpu.copy_gmem_to_smem(
        source.at[row, h, c], s[name].at[slot], s["keys_loaded"].at[slot]
      )

  def fetch_values(c):
    for source, ref in ((v_gm, Z[0]), (w_gm, Z[1])):
      plgpu.copy_gmem_to_smem(
        source.at[row, pl.ds(c * C, C), h, values], ref, values_loaded
      )

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

    if states_gm:
      plgpu.copy_smem_to_gmem(
        S_ref, states_gm[0].at[row, h, c, pl.ds(0, K), values]
      )
    plgpu.barrier_wait(values_loaded)
    v, w = (blocks.load(ref).astype(jnp.float32) for ref in Z)
    if is_projected:
      w = projected.sigmoid(w)
    blocks.store_split(w * v, *Z)  # in place of v and w
    plgpu.commit_smem()  # wgmma reads Z
    plgpu.barrier_wait(s["keys_loaded"].at[slot])
    A, Aqk, Kd = (s[name].at[slot] for name in ("A", "Aqk", "Kd"))
    Y, Qg = s["Y"].at[slot], s["Qg"].at[slot]
    R = blocks.dot(blocks.zeros(), (A, Z[0]), (A, Z[1]), (Y, S_ref))
    blocks.store_split(R, *R_refs)
    plgpu.commit_smem()  # wgmma reads R

    # Z has been read, and the loads of v and w were committed: refill.
    @pl.when(c + 1 < chunks)
    def _():
      fetch_values(c + 1)

    o = blocks.dot(
      blocks.zeros(), (Qg, S_ref), (Aqk, R_refs[0]), (Aqk, R_refs[1])
    )
    # O overwrites S: the TMA store that saves S must have read it.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    O_ref[...] = o.astype(O_ref.dtype)
    plgpu.commit_smem()  # the TMA store reads O
    plgpu.copy_smem_to_gmem(O_ref, o_gm.at[row, pl.ds(c * C, C), h, values])
    gamma_C = plgpu.load(s["gamma_C"].at[slot], layout=blocks.ROWS.reduce(1))
    S = S * blocks.of_rows(gamma_C, (K, TILE))
    Kd_T = blocks.transposed(Kd)
    return blocks.in_rows(blocks.dot(S, (Kd_T, R_refs[0]), (Kd_T, R_refs[1])))

  here = (row, h, pl.ds(0, K), values)
  S = blocks.loop(chunks, chunk, blocks.load_global(state_gm.at[here]))
  blocks.store_global(final_gm.at[here], S)
  plgpu.wait_smem_to_gmem(0)  # all stores, before the block ends


def aot_cases() -> list[tuple[str, Callable, list[Any], dict[str, int]]]:
  """Representative calls: name, function, shapes of arguments, options."""

  def case(name, B, T, H, K, V, dtype="bfloat16", **options):
    struct = jax.ShapeDtypeStruct
    wide = struct((B, H, T // C, C, K), dtype)
    square = struct((B, H, T // C, C, C), dtype)
    gamma_C = struct((B, H, T // C, K), "float32")
    value = struct((B, T, H, V), dtype)
    state = struct((B, H, K, V), "float32")

    def call(*args):
      return scan(*args, **({"save": False} | options))

    keys = [wide, wide, wide, square, square, gamma_C]
    shapes = [*keys, value, value, state]
    return name, call, shapes, {"token_heads": B * T * H}

  return [
    case("scan", 8, 2048, 16, 128, 128),
    case("scan, states saved", 8, 2048, 16, 128, 128, save=True),
    case("scan T=16384", 1, 16384, 16, 128, 128),
    case("scan K=64 V=64", 8, 2048, 16, 64, 64, save=True),
    case("scan float16", 8, 2048, 16, 128, 128, "float16", save=True),
    case("scan, gates", 8, 2048, 16, 128, 128, save=True, is_projected=True),
  ]
