"""Claims on scores with known answers."""

import numpy as np
import pytest

from gdn2_jax.eval.synthetic.mixers import MIXERS
from gdn2_jax.eval.synthetic.tasks import TASKS
from gdn2_jax.replicate.claims import CLAIMS, MARGIN, Claim, Test, evaluate


def scores(task, score="acc", **values):
  return {
    (task, mixer, score): dict(enumerate(map(float, x)))
    for mixer, x in values.items()
  }


def shifted(shift, n=10, spread=0.02, seed=0):
  """Two mixers whose scores share their seeds' noise."""
  rng = np.random.default_rng(seed)
  base = 0.6 + 0.1 * rng.standard_normal(n)
  return {"a": base + shift + spread * rng.standard_normal(n), "b": base}


def only(kind="greater"):
  test = Test("setadd", ("a",), ("b",), kind=kind)
  return (Claim("X", "a beats b", (test,)),)


@pytest.mark.parametrize(
  ("shift", "says"), [(0.2, "holds"), (-0.2, "fails"), (0.0, "undecided")]
)
def test_verdicts(shift, says):
  [(claim, verdict, [result])] = evaluate(
    scores("setadd", **shifted(shift)), only()
  )
  assert claim.name == "X" and verdict == result.verdict == says
  assert result.difference.n == 10
  assert result.difference.mean == pytest.approx(shift, abs=0.02)


def test_a_difference_within_the_noise_of_the_seeds_is_undecided():
  few = shifted(0.05, n=3, spread=0.1)
  [(_, verdict, [result])] = evaluate(scores("setadd", **few), only())
  assert verdict == "undecided" and result.difference.smallest > 0.1


@pytest.mark.parametrize(
  ("shift", "spread", "says"),
  [(0.0, 0.005, "holds"), (0.1, 0.005, "fails"), (0.0, 0.1, "undecided")],
)
def test_equal_within_a_margin(shift, spread, says):
  made = scores("setadd", **shifted(shift, spread=spread))
  [(_, verdict, _)] = evaluate(made, only("equal"))
  assert verdict == says


def test_no_order_is_claimed_nor_tested():
  [(_, verdict, [result])] = evaluate(
    scores("setadd", **shifted(0.3)), only("none")
  )
  assert verdict == "measured" and np.isnan(result.adjusted_p)


def test_seeds_are_paired_and_others_left_out():
  made = scores("setadd", a=[0.9, 0.8, 0.7, 0.6], b=[0.8, 0.7, 0.6])
  made["setadd", "b", "acc"][9] = 0.0
  [(_, _, [result])] = evaluate(made, only())
  assert result.difference.n == 3
  assert result.difference.mean == pytest.approx(0.1)


def test_p_values_are_adjusted_for_all_tests():
  one = Test("setadd", ("a",), ("b",))
  two = Test("reset", ("a",), ("b",))
  made = scores("setadd", **shifted(0.02, seed=1))
  made |= scores("reset", **shifted(0.2, seed=2))
  alone = evaluate(made, (Claim("X", "", (one,)),))[0][2][0]
  [(_, verdict, both)] = evaluate(made, (Claim("X", "", (one, two)),))
  assert both[0].adjusted_p == alone.adjusted_p  # the largest of two
  assert both[1].adjusted_p == pytest.approx(2 * both[1].difference.p)
  assert verdict in ("holds", "undecided")


def test_a_claim_needs_all_its_tests():
  tests = [Test(task, ("a",), ("b",)) for task in ("setadd", "reset", "noise")]
  claim = (Claim("X", "", tuple(tests)),)
  made = scores("setadd", **shifted(0.2))
  assert evaluate(made, claim)[0][1] == "holds"  # the others were not run
  made |= scores("reset", **shifted(0.0))
  assert evaluate(made, claim)[0][1] == "undecided"
  made |= scores("noise", **shifted(-0.2))
  assert evaluate(made, claim)[0][1] == "fails"
  assert evaluate({}, claim)[0][1] == "not run"


def test_erasing_is_judged_by_the_mean_of_the_erasing_mixers():
  made = scores(
    "overwrite",
    "hot",
    gdn2=[0.9, 0.8, 0.9],
    kda=[0.8, 0.9, 0.8],
    gdn=[0.7, 0.7, 0.7],
    mamba2=[0.3, 0.4, 0.2],
    no_erase=[0.3, 0.3, 0.3],
  )
  name, verdict, results = evaluate(made)[0]
  assert name.name == "C1" and verdict == "holds"
  assert results[0].difference.mean == pytest.approx(0.5)


def test_claims_name_what_exists():
  for claim in CLAIMS:
    for test in claim.tests:
      groups = ("acc", *TASKS[test.task].groups)
      assert test.score in groups, test
      assert set(test.better + test.worse) <= set(MIXERS), test
  assert str(CLAIMS[0].tests[0]) == (
    "overwrite, hot keys: mean(gdn2, kda, gdn) > mamba2"
  )
  assert 0 < MARGIN < 0.05
