"""Sums across warps out of turn are found, in modules lowered without a GPU."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gdn2_jax.aot import cases, kernels
from gdn2_jax.aot.turns import sums_out_of_turn
from gdn2_jax.kernels import target
from gdn2_jax.pallas import blocks
from gdn2_jax.pallas.blocks import TILE, C


def modules(function, *shapes):
  """Mosaic GPU's modules of all kernels of a function."""
  with kernels.dumps() as folder, target.use("compile"):
    traced = jax.jit(lambda *args: function(*args)).trace(*shapes)
    traced.lower(lowering_platforms=("cuda",))
    files = sorted(folder.glob("*.after_layout_inference.txt"))
    return [file.read_text() for file in files]


def found(body, warpgroups=2, axis=0):
  """What is found in a kernel of body(wg, sum_rows, meet)."""

  def kernel(x_gm, o_gm, x_ref, sums, met, half_met):
    wg = lax.axis_index("wg")
    x = blocks.load(x_ref.at[wg])

    def sum_rows():
      sums.at[wg][...] = x.sum(axis=axis)

    def meet(barrier=met):
      blocks.meet(barrier, warpgroups)

    body(wg, sum_rows, meet, met, half_met)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(sums.at[wg], o_gm.at[wg])

  def call(x):
    return blocks.call(
      "sums",
      kernel,
      blocks.struct((warpgroups, C), jnp.float32),
      scratch_types=[
        blocks.smem((warpgroups, C, TILE), jnp.float32),
        plgpu.SMEM((warpgroups, C), jnp.float32),
        plgpu.Barrier(num_arrivals=warpgroups),
        plgpu.Barrier(num_arrivals=1),
      ],
      num_threads=warpgroups,
      thread_name="wg",
    )(x)

  (module,) = modules(call, blocks.struct((C, C), jnp.float32))
  return sums_out_of_turn(module)


def run_in_turns(wg, warpgroups, barrier, body):
  """Runs `body` in one warpgroup after the other, with a meeting after each."""
  for n in range(warpgroups):
    pl.when(wg == n)(body)
    blocks.meet(barrier, warpgroups)


def at_once(wg, sum_rows, meet, *_):
  sum_rows()
  meet()


def in_turns(wg, sum_rows, meet, met, _):
  run_in_turns(wg, 2, met, sum_rows)
  run_in_turns(wg, 2, met, sum_rows)


def in_three_turns(wg, sum_rows, meet, met, _):
  run_in_turns(wg, 3, met, sum_rows)


def without_meeting(wg, sum_rows, meet, *_):
  for n in range(2):
    pl.when(wg == n)(sum_rows)


def one_branch_each(wg, sum_rows, meet, *_):
  def branch():
    sum_rows()

  lax.cond(wg == 0, branch, branch)


def meeting_of_one(wg, sum_rows, meet, met, half_met):
  pl.when(wg == 0)(sum_rows)
  meet(half_met)
  pl.when(wg == 1)(sum_rows)


def meeting_before(wg, sum_rows, meet, *_):
  pl.when(wg == 0)(sum_rows)
  pl.when(wg == 1)(sum_rows)
  meet()


def branch_of_all(wg, sum_rows, meet, *_):
  pl.when(wg >= 0)(sum_rows)


def one_alone(wg, sum_rows, meet, *_):
  def some_turn(n, _):
    pl.when((wg == 1) & (n > 3))(sum_rows)

  blocks.loop(8, some_turn, None)
  pl.when(wg > 0)(sum_rows)
  pl.when(jnp.logical_not(wg == 0))(sum_rows)


def loop_that_does_not_meet(wg, sum_rows, meet, *_):
  def turn(n, _):
    pl.when(wg == 0)(sum_rows)
    meet()
    pl.when(wg == 1)(sum_rows)

  blocks.loop(8, turn, None)


def loop_that_meets(wg, sum_rows, meet, met, _):
  def turn(n, _):
    run_in_turns(wg, 2, met, sum_rows)

  blocks.loop(8, turn, None)


@pytest.mark.parametrize(
  ("body", "count"),
  [
    (at_once, 1),
    (without_meeting, 2),
    (one_branch_each, 2),
    (meeting_of_one, 2),
    (meeting_before, 2),
    (branch_of_all, 1),
    (loop_that_does_not_meet, 2),
  ],
)
def test_sums_at_the_same_time_are_found(body, count):
  sentences = found(body)
  assert len(sentences) == count
  for sentence in sentences:
    assert "warpgroups 0, 1 may reduce vector<64x64xf32>" in sentence


@pytest.mark.parametrize("body", [in_turns, one_alone, loop_that_meets])
def test_sums_in_turns_pass(body):
  assert found(body) == ()


def test_three_warpgroups_take_turns_as_well():
  assert found(in_three_turns, warpgroups=3) == ()
  assert "warpgroups 0, 1, 2" in found(at_once, warpgroups=3)[0]
  # The turns of two leave out the third, whose barrier waits for three.
  assert found(meeting_of_one, warpgroups=3)


def test_one_warpgroup_needs_no_turns():
  assert found(at_once, warpgroups=1) == ()


def test_a_sum_along_a_row_stays_in_a_warp():
  assert found(at_once, axis=1) == ()


def test_a_module_without_a_launch_does_not_pass():
  with pytest.raises(ValueError, match="threads"):
    sums_out_of_turn("module {}")


def test_a_module_that_cannot_be_read_does_not_pass():
  text = "threads(%a, %b, %c) in (%d = %c256, ...) vector.reduction"
  with pytest.raises(ValueError, match="cannot parse"):
    sums_out_of_turn(text)


CASES = cases.find_cases("")[0]


# Those that lower fast; `make aot` does the same with every kernel.
@pytest.mark.parametrize(
  ("name", "warpgroups"),
  [("scan, states saved", 2), ("scan, gates", 2), ("scan_grad", 2)],
)
def test_kernels_of_several_warpgroups_take_turns(name, warpgroups):
  (case,) = (case for case in CASES if case.name == name)
  (module,) = modules(case.function, *case.shapes)
  assert f"= %c{128 * warpgroups}, " in module  # threads
  assert sums_out_of_turn(module) == ()
