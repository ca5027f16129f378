"""Statistics on draws whose truth is known."""

import numpy as np
import pytest
from scipy import stats

from gdn2_jax.eval import statistics
from gdn2_jax.eval.statistics import (
  Difference,
  holm,
  paired_difference,
  smallest_difference,
  verdict,
)


def test_few_seeds_get_students_interval(rng):
  a, b = rng.normal(0.1, 0.05, 5), rng.normal(0, 0.05, 5)
  got = paired_difference(a, b)
  want = stats.ttest_rel(a, b)
  interval = want.confidence_interval(0.95)
  np.testing.assert_allclose(
    [got.mean, got.low, got.high, got.p],
    [np.mean(a - b), interval.low, interval.high, want.pvalue],
  )
  assert got.n == 5


def test_intervals_cover_the_truth(rng, monkeypatch):
  """Of 200 experiments, 95% +- 1.5%: 99% of such counts are in [180, 198]."""
  monkeypatch.setattr(statistics, "RESAMPLES", 500)
  for n in (4, 20):
    covered = 0
    for _ in range(200):
      shared = rng.normal(0, 1, n)  # of a seed: pairing takes it out
      a, b = shared + rng.normal(0.3, 0.1, n), shared + rng.normal(0, 0.1, n)
      got = paired_difference(a, b)
      covered += got.low <= 0.3 <= got.high
    assert 175 <= covered <= 199


def test_pairing_takes_out_what_a_seed_shares(rng):
  shared, n = rng.normal(0, 1, 10), 10
  a, b = shared + 0.1 + rng.normal(0, 0.01, n), shared + rng.normal(0, 0.01, n)
  paired, other = paired_difference(a, b), paired_difference(a, np.roll(b, 1))
  assert paired.low > 0 and other.low < 0 < other.high


def test_examples_within_a_seed_widen_the_interval(rng):
  """Seeds that agree by chance do not hide how few examples they are of."""
  n, examples = 8, 10
  noise = rng.normal(0, 1, (n, examples))
  noise -= noise.mean(axis=1, keepdims=True)  # every seed has the same mean
  got = paired_difference(0.1 + noise, np.zeros_like(noise))
  assert got.mean == pytest.approx(0.1)
  # Eight seeds of ten examples of unit spread: 1.96 / sqrt(80).
  assert got.high - got.low == pytest.approx(2 * 0.22, rel=0.15)
  by_seed = paired_difference(0.1 + noise.mean(axis=1), np.zeros(n))
  assert by_seed.high - by_seed.low < 1e-6


def test_one_seed_decides_nothing():
  got = paired_difference(np.array([1.0]), np.array([0.0]))
  assert got.mean == 1 and np.isnan([got.low, got.high, got.p]).all()
  assert verdict(got, got.p) == "undecided"


def test_the_smallest_difference_is_found_at_its_power(rng):
  for n in (5, 10):
    shift = smallest_difference(1.0, n)
    draws = rng.normal(shift, 1, (4000, n))
    found = stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05
    # 0.8 +- 0.6% of 4000 experiments.
    assert found.mean() == pytest.approx(0.8, abs=0.025)


def test_holm_steps_down():
  # By hand: 3 * 0.01, 2 * 0.02, and 0.04 not below the one before it.
  assert holm([0.02, 0.01, 0.04]) == pytest.approx([0.04, 0.03, 0.04])
  assert holm([0.6, 0.7]) == [1.0, 1.0]
  assert holm([]) == []


def test_a_family_of_null_claims_is_rarely_rejected(rng):
  """One or more of five: Bonferroni alone allows 25% without it."""
  p = stats.ttest_1samp(rng.normal(0, 1, (2000, 5, 8)), 0, axis=2).pvalue
  rejected = np.mean([min(holm(row)) < 0.05 for row in p.tolist()])
  assert rejected == pytest.approx(0.05, abs=0.015)


@pytest.mark.parametrize(
  ("mean", "low", "high", "p", "says"),
  [
    (0.2, 0.1, 0.3, 0.01, "holds"),
    (-0.2, -0.3, -0.1, 0.01, "fails"),
    (0.2, 0.1, 0.3, 0.06, "undecided"),  # one of many claims
    (0.2, -0.1, 0.5, 0.01, "undecided"),
  ],
)
def test_verdicts(mean, low, high, p, says):
  assert verdict(Difference(mean, low, high, p, 8, 0.1), p) == says


def test_what_cannot_be_compared_is_refused():
  with pytest.raises(ValueError, match=r"^b: got shape \(2,\), expected"):
    paired_difference(np.zeros(3), np.zeros(2))
  with pytest.raises(ValueError, match=r"^b: got nan at \(1,\), expected fin"):
    paired_difference(np.zeros(2), np.array([0, np.nan]))
  with pytest.raises(ValueError, match=r"^n=1: expected at least 2 seeds"):
    smallest_difference(1.0, 1)
