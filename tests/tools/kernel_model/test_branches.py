"""Rules of branches, and paths by them."""

import pytest

from tests.tools.kernel_model.listing import BRANCH, LOAD, WAIT, listing
from tools.kernel_model.branches import (
  UndecidedBranch,
  is_taken,
  match_rules,
  trace,
)
from tools.kernel_model.sass import read_sass

# A loop with a part for one warpgroup: branches at 1 and 4.
LOOP = read_sass(
  listing(
    ".L_x_0",
    "NOP",
    BRANCH,
    LOAD,
    LOAD,
    ".L_x_1",
    "@P1 BRA `(.L_x_0)",
    "EXIT",
  )
)


@pytest.mark.parametrize(
  "rule, taken",
  [
    ("loop 3", "110110"),
    ("last of 2", "010101"),
    ("always", "111111"),
    ("never", "000000"),
    ("wg1", "111111"),
    ("not wg1", "000000"),
    ("wg0 or last of 3", "001001"),
    ("last of chunks", "000100"),
    ("loop chunks", "111011"),
  ],
)
def test_a_rule_says_on_which_visits_a_branch_is_taken(rule, taken):
  found = [is_taken(rule, 1, visit, chunks=4) for visit in range(6)]
  assert "".join(str(int(x)) for x in found) == taken


@pytest.mark.parametrize("rule", ["", "loop", "loop x", "wg", "sometimes"])
def test_unknown_rules_are_refused(rule):
  with pytest.raises(ValueError, match=f"branches: '{rule}', expected"):
    is_taken(rule, 0, 0, 1)


def test_every_warpgroup_has_its_path():
  rules = match_rules(LOOP, ["not wg1", "loop 2"])
  assert trace(LOOP, rules, 0) == [0, 1, 4, 0, 1, 4, 5]
  assert trace(LOOP, rules, 1) == [0, 1, 2, 3, 4] * 2 + [5]
  by_chunks = match_rules(LOOP, ["last of chunks", "loop chunks"])
  paths = [trace(LOOP, by_chunks, 0, chunks) for chunks in (1, 3)]
  assert [path.count(2) for path in paths] == [0, 2]


def test_spin_waits_need_no_rule():
  again = ["@!P0 NANOSLEEP.SYNCS 0x989680", "@!P0 BRA `(.L_x_1)"]
  program = read_sass(
    listing(
      *(WAIT, "@!P0 BRA `(.L_x_1)", ".L_x_2", "EXIT"),
      *(".L_x_1", WAIT, *again, "BRA `(.L_x_2)"),
    )
  )
  assert match_rules(program, []) == {}
  assert trace(program, {}, 0) == [0, 1, 2]


@pytest.mark.parametrize(
  "rules, reason",
  [
    ([], "branch 0 has no rule"),
    (["not wg1"], "branch 1 has no rule"),
    (["loop 2", "loop 2"], "branch 0 goes forward, its rule 'loop 2' does not"),
    (["wg0", "wg0"], "branch 1 goes backward, its rule 'wg0' does not"),
    (["wg0", "loop 2", "wg1"], "3 rules for 2 branches"),
  ],
)
def test_rules_that_do_not_fit_list_all_branches(rules, reason):
  with pytest.raises(UndecidedBranch) as error:
    match_rules(LOOP, rules)
  text = str(error.value)
  assert text.startswith(reason + "\n")
  assert "skips 2 instructions, 2 UTMALDG" in text
  assert "back over 4 instructions, 2 UTMALDG" in text
  assert all(repr(rule) in text for rule in rules)


def test_the_first_branch_that_does_not_fit_is_marked():
  with pytest.raises(UndecidedBranch) as error:
    match_rules(LOOP, ["not wg1"])
  marked = [x for x in str(error.value).splitlines() if x.startswith(">>")]
  assert len(marked) == 1 and "[4] @P1" in marked[0]
  assert "> [4] @P1 BRA" in str(error.value)


def test_a_path_without_an_end_is_refused(monkeypatch):
  monkeypatch.setattr("tools.kernel_model.branches._LIMIT", 100)
  program = read_sass(listing(".L_x_0", "NOP", "BRA `(.L_x_0)", "EXIT"))
  with pytest.raises(ValueError, match="no end after 100 instructions"):
    trace(program, {}, 0)
