"""Short versions of what `make faults` does, on real runs."""

import pytest

from tests.faults import damage, signals, stops
from tests.faults.lab import GRID, Lab
from tests.faults.outcome import Outcome, format_table, tries

pytestmark = [
  pytest.mark.deep,
  pytest.mark.usefixtures("frozen_heap"),
  pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
  lab = Lab(tmp_path_factory.mktemp("lab"), num_steps=60)
  lab.prepare()
  return lab


def passed(fault, lab, count, **options):
  outcome = fault(lab, count, lambda: None, **options)
  assert outcome.passed, format_table([outcome])
  assert outcome.tries == count
  return outcome


def test_the_uninterrupted_run_is_the_truth(lab):
  assert sorted(lab.truth) == list(range(1, 61))
  assert sorted(lab.digests) == list(range(GRID, 61, GRID))
  assert lab.wrong_steps(lab.straight) == []
  # What is compared with it has to be equal in every bit.
  loss, norm, lr = lab.truth[7]
  lab.truth[7] = (loss * (1 + 2**-50), norm, lr)
  assert lab.wrong_steps(lab.straight) == [7]
  lab.truth[7] = (loss, norm, lr)


def test_killed_runs_lose_nothing(lab):
  outcome = passed(signals.kill_loop, lab, 2)
  assert "bit-identical" in outcome.notes["state after the last kill"]


@pytest.mark.deep
def test_killed_half_way_through_removing_a_step(lab):
  passed(signals.kill_in_retention, lab, 1, faults=("die_in_trash",))


def test_stuck_process_is_ended_by_the_watchdog(lab):
  # On a busy machine late, but never not at all.
  passed(stops.stuck, lab, 1, late=60.0)


def test_the_last_save_fails(lab):
  passed(damage.failed_last_save, lab, 1)


@pytest.mark.deep
def test_second_sigterm_during_the_save(lab):
  passed(signals.second_signal, lab, 1)


def test_flipped_bits(lab):
  outcome = passed(damage.bit_flips, lab, 20)
  assert outcome.notes["fell back"] > 0


@pytest.mark.deep
def test_flips_would_be_noticed_if_nobody_looked(lab, monkeypatch):
  """The same flips, restored as orbax alone would: some go unseen."""
  monkeypatch.setattr(
    "gdn2_jax.train.checkpoint.manager.verify", lambda *_: None
  )
  outcome = damage.bit_flips(lab, 24, lambda: None, kinds_with="process_0/d")
  assert outcome.silent > 0
  assert not outcome.passed


def test_counting():
  outcome = Outcome("example")
  ticks = []
  for number, one in enumerate(tries(outcome, 4, lambda: ticks.append(1))):
    one.expect(number != 1, "the second one failed")
    one.expect(False, "only the first problem is kept") if number == 1 else None
    one.lost(3 if number == 2 else 0)
    one.silent([5, 6] if number == 3 else [])
  assert len(ticks) == outcome.tries == 4
  assert (outcome.survived, outcome.lost, outcome.silent) == (1, 3, 1)
  assert not outcome.passed
  assert outcome.problems == [
    "try 2: the second one failed",
    "try 3: 3 committed steps lost",
    "try 4: other numbers at steps [5, 6]",
  ]
  text = format_table([outcome])
  assert text.splitlines()[2].split()[:5] == ["example", *"4131"]
  assert not Outcome("nothing was done").passed
