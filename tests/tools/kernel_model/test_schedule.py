"""Cycles of small programs that can be counted by hand."""

import pytest

from tests.tools.kernel_model.listing import (
  ARRIVE,
  BRANCH,
  LOAD,
  WAIT,
  line,
  listing,
)
from tools.kernel_model.assumptions import LEVELS
from tools.kernel_model.branches import match_rules, trace
from tools.kernel_model.sass import read_sass
from tools.kernel_model.schedule import simulate

MID = LEVELS["mid"]


def run(parts, rules=(), warpgroups=1, latencies=MID, **options):
  program = read_sass(listing(*parts))
  rules = match_rules(program, rules)
  paths = [trace(program, rules, wg) for wg in range(warpgroups)]
  return simulate(program, paths, latencies, **options)


def test_stall_counts_space_the_instructions_of_a_warp():
  # Issued at 0, 5 and 7.
  done = run([line("NOP", 5), line("NOP", 2), "EXIT"])
  assert (done.cycles, done.issued) == (8, 3)


def test_warps_share_a_pipe():
  ands = ["LOP3.LUT R0, R1, R2, RZ, 0xc0, !PT"] * 4
  # One warp issues at 0, 2, 4, 6 and ends at 7; two fill the pipe for 16.
  alone, both = run([*ands, "EXIT"]), run([*ands, "EXIT"], warpgroups=2)
  assert (alone.cycles, alone.busy["ALU"]) == (8, 8)
  assert (both.cycles, both.busy["ALU"]) == (16, 16)
  assert both.waits[0, "ALU"] + both.waits[1, "ALU"] > alone.waits[0, "ALU"]


def test_warps_on_different_pipes_fill_each_others_gaps():
  parts = ["LOP3.LUT R0, R1, R2, RZ, 0xc0, !PT", "FADD R3, R4, R5"] * 4
  done = run([*parts, "EXIT"], warpgroups=2)
  # 16 instructions and two ends, one in every cycle.
  assert (done.cycles, done.issued) == (18, 18)


def test_a_scoreboard_is_waited_for():
  parts = [line("LDS R4, [R5]", write=0), line("FADD R6, R4, R4", waits=(0,))]
  done = run([*parts, "EXIT"])
  assert done.cycles == MID.lds + 2
  assert done.waits[0, "scoreboard"] == MID.lds - 1
  other = run([parts[0], line("FADD R6, R4, R4", waits=(1,)), "EXIT"])
  assert other.cycles == 3


def test_operands_are_free_before_the_result_is_there():
  parts = [line("LDS R4, [R5]", read=0), line("MOV R5, RZ", waits=(0,))]
  assert run([*parts, "EXIT"]).cycles == MID.read_part * MID.lds + 2


def test_a_meeting_of_four_warpgroups_ends_with_the_last():
  late = [BRANCH, line("NOP", 15), line("NOP", 15), ".L_x_1"]
  done = run([*late, ARRIVE, WAIT, "EXIT"], ["not wg3"], warpgroups=4)
  # Branches at 0 to 3. Warpgroup 3 can go on at 13 and arrives at 43. The waits
  # end at 67 to 70, and the four ends are issued after them.
  assert MID.branch == 10 and MID.sync == 24
  assert done.cycles == 43 + 24 + 8
  # Arrived at 10 and issued at 67; the arrival takes one cycle.
  assert done.waits[0, "meeting"] == 56
  assert done.waits[3, "meeting"] == 23


def test_meetings_of_two_ctas_are_apart():
  late = [BRANCH, line("NOP", 15), ".L_x_1"]
  parts = [*late, ARRIVE, WAIT, "EXIT"]
  one = run(parts, ["not wg1"], warpgroups=2)
  two = run(parts, ["not wg1"], warpgroups=2, ctas=2)
  assert two.issued == 2 * one.issued
  assert one.cycles < two.cycles < one.cycles + 10


def test_a_meeting_that_one_never_reaches_is_refused():
  parts = [BRANCH, ARRIVE, WAIT, ".L_x_1", "EXIT"]
  with pytest.raises(ValueError, match="meeting that the others never reach"):
    run(parts, ["wg1"], warpgroups=2)


def test_loads_are_waited_for_or_not():
  parts = [LOAD, WAIT, "EXIT"]
  assert run(parts).cycles == MID.tma + 2
  assert run(parts, waits_for_loads=False).cycles == 3


def product(shape, a):
  return f"HGMMA.{shape}.F32.BF16 R8, {a}, gdesc[UR4], R8, gsb0"


@pytest.mark.parametrize(
  "shape, a, level, cycles",
  [
    ("64x64x16", "R4", "mid", 32),
    ("64x128x16", "R4", "mid", 64),
    ("64x64x16", "gdesc[UR8]", "mid", 32),
    ("64x64x16", "gdesc[UR8]", "high", 42),
    # 3 KB of operands from shared memory, 128 bytes a cycle.
    ("64x32x16", "gdesc[UR8]", "mid", 24),
    ("64x32x16", "R4", "mid", 16),
  ],
)
def test_products_take_the_tensor_core(shape, a, level, cycles):
  x = LEVELS[level]
  wait = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
  done = run([product(shape, a), wait, "EXIT"], latencies=x)
  assert done.busy["tensor"] == cycles
  assert done.cycles == x.gmma_start + cycles + x.gmma + 2
  # Products of all warpgroups queue up.
  more = run([product(shape, a), wait, "EXIT"], warpgroups=2, latencies=x)
  assert more.cycles == x.gmma_start + 2 * cycles + x.gmma + 2


def test_barriers_and_fences_take_an_assumed_time():
  parts = ["BAR.SYNC.DEFER_BLOCKING R2, 0x80", "FENCE.VIEW.ASYNC.S", "EXIT"]
  done = run(parts)
  assert done.cycles == MID.bar + MID.fence + 1
  assert done.waits[0, "bar"] == MID.bar - 1
