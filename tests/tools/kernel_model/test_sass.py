"""Control bits, branches and meetings of listings."""

import pytest

from tests.tools.kernel_model.listing import (
  ARRIVE,
  RECORDED,
  WAIT,
  line,
  listing,
)
from tools.kernel_model.assumptions import pipe_of
from tools.kernel_model.sass import read_sass


def test_recorded_lines_have_their_control_bits():
  load, thread, branch, pack, end = read_sass(RECORDED)
  assert [x.stall for x in (load, thread, branch, pack, end)] == [1, 7, 5, 2, 5]
  assert (thread.write, thread.read, thread.waits) == (1, 7, ())
  assert (branch.write, branch.waits) == (7, (1,))
  assert (branch.predicate, branch.base, branch.target) == ("@P5", "BRA", 4)
  assert (pack.op, pack.base) == ("F2FP.BF16.F32.PACK_AB", "F2FP")
  assert (pack.pipe, pack.busy) == ("ALU", 2)
  assert str(branch) == "@P5 BRA `(.L_x_0)"


def test_all_control_bits_are_read():
  made = line("LDS R4, [R5]", 11, write=3, read=5, waits=(0, 2, 5))
  (x, _) = read_sass(listing(made, "EXIT"))
  assert (x.stall, x.write, x.read, x.waits) == (11, 3, 5, (0, 2, 5))


def test_a_uniform_predicate_is_one():
  x, _ = read_sass(listing(".L_x_1", "BRA.U UP0, `(.L_x_1)", "EXIT"))
  assert x.predicate == "@UP0" and x.target == 0
  y, _ = read_sass(listing(".L_x_1", "BRA `(.L_x_1)", "EXIT"))
  assert y.predicate == ""


def test_only_the_wait_after_an_arrival_is_a_meeting():
  program = read_sass(listing(WAIT, ARRIVE, WAIT, WAIT, "EXIT"))
  assert [x.arrives for x in program] == [0, 1, 0, 0, 0]
  assert [x.meets for x in program] == [0, 0, 1, 0, 0]


@pytest.mark.parametrize(
  "text, match",
  [
    ("nothing", "no instruction"),
    (listing("CALL.REL.NOINC `(.L_x_1)"), "calls and computed branches"),
    (listing("BRA `(.L_x_7)"), "a label of the code"),
  ],
)
def test_what_cannot_be_followed_is_refused(text, match):
  with pytest.raises(ValueError, match=match):
    read_sass(text)


@pytest.mark.parametrize(
  "op, pipe",
  [
    ("LOP3.LUT", ("ALU", 2)),
    ("IMAD.U32", ("IMAD", 2)),
    ("FFMA", ("FMA", 1)),
    ("MUFU.EX2", ("XU", 8)),
    ("LDS.128", ("MIO", 16)),
    ("LDS.U.64", ("MIO", 8)),
    ("STS", ("MIO", 4)),
    ("LDSM.16.M88.4", ("MIO", 16)),
    ("UISETP.NE.U32.AND", ("uniform", 2)),
    ("UTMALDG.3D", ("", 0)),
    ("BAR.SYNC.DEFER_BLOCKING", ("", 0)),
  ],
)
def test_pipes(op, pipe):
  assert pipe_of(op) == pipe
