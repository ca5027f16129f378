"""States at the borders of sections of a sequence that run in parallel.

A chunk maps the state S before it to gamma_C S + Kd^T (A Z - Y S), so a section
maps it to P S + U: P [K, K] is the product of the chunks' transitions, and U
[K, V] what becomes of a state of zeros. The start states are

  S_0 = state        S_1 = P_0 S_0 + U_0        S_{n+1} = P_n S_n + U_n

Two kernels pass over the chunks, in parallel over sections: that of scan.py
without outputs computes S_1 and U, and one that starts from the identity and
has no Z computes P. A third goes from section to section. Gradients go the
other way, with P^T and the kernel of scan_grad.py.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gdn2_jax.pallas import blocks
from gdn2_jax.pallas.blocks import TILE, C
from gdn2_jax.pallas.gdn2.scan import section_ends, section_of
from gdn2_jax.pallas.gdn2.scan_grad import section_start_gradients

_STAGES = 2  # buffers of operands
_PARTS = jnp.bfloat16  # of P and S between sections: its range is float32's


def start_states(
  Y_neg, Kd, A, gamma_C, v, w, state, *, sections, is_projected=False
):
  """Computes the start states of all sections.

  The arguments are those of scan.scan, with at least three sections. Returns
  [B, H, sections, K, V], float32.
  """
  P = transitions(Y_neg, Kd, gamma_C, sections=sections)
  ends = section_ends(
    Y_neg,
    Kd,
    A,
    gamma_C,
    v,
    w,
    state,
    sections=sections,
    is_projected=is_projected,
  )
  return _chain(P, ends, state, reverse=False)


def end_gradients(Y_neg, Qg, Kd, Aqk, gamma_C, do, dstate, *, sections):
  """Computes the gradients of the end states of all sections.

  The arguments are those of scan_grad.scan_grad, with at least three sections.
  Returns [B, H, sections, K, V], float32.
  """
  # Computed again: they cannot be residuals, whose shapes must be the same for
  # all rows and heads and for those of one device; their number differs.
  P = transitions(Y_neg, Kd, gamma_C, sections=sections)
  dstarts = section_start_gradients(
    Y_neg, Qg, Kd, Aqk, gamma_C, do, dstate, sections=sections
  )
  return _chain(P, dstarts, dstate, reverse=True)


def transitions(Y_neg, Kd, gamma_C, *, sections):
  """Computes P^T of all sections but the first and the last.

  Returns hi and lo, both [B, H, sections - 2, K, K], bfloat16, from the
  arguments of scan.scan. A warpgroup holds 64 columns of P as the rows of X
  [64, K], so that X and R are operands of products in registers:

    R^T = -X Y^T        X <- X gamma_C + R^T Kd
  """
  B, H, chunks, _, K = Y_neg.shape
  dtype = Y_neg.dtype
  tiles = K // TILE
  present = range(1, sections - 1)
  wide = blocks.smem((_STAGES, C, K), dtype)
  part = blocks.struct((B, H, len(present), K, K), _PARTS)

  def body(Y_gm, Kd_gm, gamma_C_gm, hi_gm, lo_gm, Y, Kd, gamma_C, loaded, met):
    h, wg = (lax.axis_index(name) for name in ("h", "wg"))
    section = section_of(lax.axis_index("b"), chunks, sections, present)

    def fetch(c):
      slot = lax.rem(c, _STAGES)
      for source, ref in ((Y_gm, Y), (Kd_gm, Kd), (gamma_C_gm, gamma_C)):
        plgpu.copy_gmem_to_smem(
          source.at[section.row, h, section.first + c],
          ref.at[slot],
          loaded.at[slot],
        )

    @pl.when(wg == 0)
    def _():
      fetch(jnp.int32(0))

    def chunk(c, X):
      slot = lax.rem(c, _STAGES)
      # All warpgroups have finished the last chunk, whose slot is refilled.
      blocks.meet(met, tiles)

      @pl.when((wg == 0) & (c + 1 < section.chunks))
      def _():
        fetch(c + 1)

      plgpu.barrier_wait(loaded.at[slot])
      Y_T = blocks.transposed(Y.at[slot])
      R = blocks.dot(
        blocks.zeros(), *((x, Y_T) for x in blocks.split(X, dtype))
      )
      factor = plgpu.load(gamma_C.at[slot], layout=blocks.ROWS.reduce(0))
      X = X * blocks.of_columns(factor, (TILE, K))
      X = blocks.dot(X, *((r, Kd.at[slot]) for r in blocks.split(R, dtype)))
      return blocks.in_rows(X)

    row, column = blocks.iotas((TILE, K))
    X = jnp.where(row + wg * TILE == column, 1.0, 0.0)
    X = blocks.loop(section.chunks, chunk, X)
    here = (
      section.row,
      h,
      section.index - present.start,
      pl.ds(wg * TILE, TILE),
    )
    for ref, x in zip((hi_gm, lo_gm), blocks.split(X, _PARTS), strict=True):
      blocks.store_untiled(ref.at[here], x)

  return blocks.call(
    "gdn2_section_transitions",
    body,
    [part, part],
    scratch_types=[
      wide,
      wide,
      plgpu.SMEM((_STAGES, K), jnp.float32),
      plgpu.Barrier(num_arrivals=3, num_barriers=_STAGES),
      plgpu.Barrier(num_arrivals=tiles),
    ],
    grid=(B * len(present), H),
    grid_names=("b", "h"),
    num_threads=tiles,
    thread_name="wg",
  )(Y_neg, Kd, gamma_C)


def _chain(P, results, first, *, reverse):
  """States that all sections start from, in the order of `reverse`.

  Args:
    P: hi and lo of P^T of the inner sections.
    results: [B, H, sections - 1, K, V], of the first section from its true
      state, of the inner ones from zeros.
    first: State of the first section [B, H, K, V].
    reverse: Go from the last section to the first, with P^T for P.
  """
  B, H, inner, K, _ = P[0].shape
  V = results.shape[-1]
  square = blocks.smem((_STAGES, K, K), _PARTS)
  tile = blocks.smem((K, TILE), _PARTS)

  def body(P_hi_gm, P_lo_gm, results_gm, first_gm, starts_gm, *scratch):
    P_hi, P_lo, S_hi, S_lo, loaded = scratch
    row, h, j = (lax.axis_index(name) for name in ("b", "h", "j"))
    tile = (pl.ds(0, K), pl.ds(j * TILE, TILE))

    def nth(n, count):
      return (row, h, count - 1 - n if reverse else n)

    def fetch(n):
      slot = lax.rem(n, _STAGES)
      for source, ref in ((P_hi_gm, P_hi), (P_lo_gm, P_lo)):
        plgpu.copy_gmem_to_smem(
          source.at[nth(n, inner)], ref.at[slot], loaded.at[slot]
        )

    def result(n):
      return blocks.load_global(results_gm.at[(*nth(n, inner + 1), *tile)])

    def store(n, S):
      blocks.store_untiled(starts_gm.at[(*nth(n, inner + 2), *tile)], S)

    def section(n, S):
      slot = lax.rem(n, _STAGES)
      store(n + 1, S)
      blocks.store_split(S, S_hi, S_lo)
      plgpu.commit_smem()  # wgmma reads S

      @pl.when(n + 1 < inner)
      def _():
        fetch(n + 1)  # into the slot of the last section, which is done

      U = result(n + 1)
      plgpu.barrier_wait(loaded.at[slot])
      hi, lo = P_hi.at[slot], P_lo.at[slot]
      if not reverse:
        hi, lo = blocks.transposed(hi), blocks.transposed(lo)
      S = blocks.dot(U, (hi, S_hi), (hi, S_lo), (lo, S_hi))
      return blocks.in_rows(S)

    fetch(jnp.int32(0))
    store(0, blocks.load_global(first_gm.at[(row, h, *tile)]))
    store(inner + 1, blocks.loop(inner, section, result(0)))

  return blocks.call(
    "gdn2_section_chain",
    body,
    blocks.struct((B, H, inner + 2, K, V), jnp.float32),
    scratch_types=[
      square,
      square,
      tile,
      tile,
      plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
    ],
    grid=(B, H, V // TILE),
    grid_names=("b", "h", "j"),
    num_threads=1,
    thread_name="wg",
  )(*P, results, first)


def aot_cases() -> list[tuple[str, Callable, list[Any], dict[str, int]]]:
  """Representative calls: name, function, shapes of arguments, options."""
  B, T, H, sections = 1, 16384, 16, 8

  def cases(suffix, K, V, dtype="bfloat16"):
    def struct(*shape, dtype=dtype):
      return jax.ShapeDtypeStruct(shape, dtype)

    NC = T // C
    wide, square = struct(B, H, NC, C, K), struct(B, H, NC, C, C)
    gamma_C = struct(B, H, NC, K, dtype="float32")
    value, state = struct(B, T, H, V), struct(B, H, K, V, dtype="float32")
    P = 2 * [struct(B, H, sections - 2, K, K, dtype=_PARTS)]
    results = struct(B, H, sections - 1, K, V, dtype="float32")
    calls = {
      "transitions": (transitions, [wide, wide, gamma_C]),
      "ends": (
        section_ends,
        [wide, wide, square, gamma_C, value, value, state],
      ),
      "start gradients": (
        section_start_gradients,
        [wide, wide, wide, square, gamma_C, value, state],
      ),
    }
    for name, (function, shapes) in calls.items():
      call = functools.partial(function, sections=sections)
      yield f"section {name}{suffix}", call, shapes
    if dtype != "bfloat16":  # P and S have one dtype whatever that of q is
      return
    for name, reverse in (("chain", False), ("chain, reversed", True)):

      def chain(hi, lo, results, first, reverse=reverse):
        return _chain((hi, lo), results, first, reverse=reverse)

      yield f"section {name}{suffix}", chain, [*P, results, state]

  found = [
    *cases("", 128, 128),
    *cases(", K=64 V=64", 64, 64),
    *cases(", float16", 128, 128, "float16"),
  ]
  name, _, shapes = found[1]
  call = functools.partial(section_ends, sections=sections, is_projected=True)
  found.append((f"{name}, gates", call, shapes))
  return [(*case, {"token_heads": B * T * H}) for case in found]
