"""Differences between mixers over seeds: estimate, interval, verdict.

The unit is the seed. Runs of two mixers with the same seed see the same data
and share initial values where parameters have the same name, so differences are
taken within seeds (paired).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import optimize, stats

FEW = 6  # seeds below which a bootstrap over them is too narrow
RESAMPLES = 10_000
LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Difference:
  """Mean of paired differences a - b over seeds.

  Attributes:
    mean: Estimate.
    low: Lower end of the 95% interval.
    high: Upper end.
    p: Two-sided p-value of a paired t-test that the mean is 0.
    n: Seeds.
    smallest: Smallest true difference that this n finds with 80% power, given
      the spread of these seeds.
    error: Standard error of the mean.
  """

  mean: float
  low: float
  high: float
  p: float
  n: int
  smallest: float
  error: float = np.nan


def paired_difference(a: np.ndarray, b: np.ndarray) -> Difference:
  """Estimates the mean of a - b, paired by seed.

  The interval is Student's t for fewer than 6 seeds, else that of a bootstrap
  over seeds and, if scores by example are given, over examples within a seed.

  Args:
    a: Scores [seeds] or [seeds, examples].
    b: The same of what it is compared with, in the same order.

  Returns:
    The estimate. With one seed, interval and p-value are nan.

  Raises:
    ValueError: Shapes differ, no seed is given, or a score is not finite.
  """
  a, b = np.asarray(a, float), np.asarray(b, float)
  if a.shape != b.shape or a.ndim not in (1, 2) or not a.size:
    raise ValueError(
      f"b: got shape {b.shape}, expected that of a, [seeds] or [seeds,"
      f" examples]: {a.shape}"
    )
  for name, x in (("a", a), ("b", b)):
    if not np.isfinite(x).all():
      at = tuple(int(i) for i in np.argwhere(~np.isfinite(x))[0])
      raise ValueError(f"{name}: got {x[at]} at {at}, expected finite scores")
  by_example = (a - b).reshape(len(a), -1)
  seeds = by_example.mean(axis=1)
  mean, n = float(seeds.mean()), len(seeds)
  if n == 1:
    return Difference(mean, np.nan, np.nan, np.nan, 1, np.nan)
  spread = float(seeds.std(ddof=1))
  if n < FEW:
    half = stats.t.ppf((1 + LEVEL) / 2, n - 1) * spread / np.sqrt(n)
    low, high = mean - half, mean + half
  else:
    means = _bootstrap(by_example)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
  return Difference(
    mean=mean,
    low=float(low),
    high=float(high),
    p=_p_value(mean, spread, n),
    n=n,
    smallest=smallest_difference(spread, n),
    error=float(spread / np.sqrt(n)),
  )


def _p_value(mean, spread, n):
  if spread == 0:
    return float(mean == 0)
  return float(2 * stats.t.sf(abs(mean) * np.sqrt(n) / spread, n - 1))


def _bootstrap(by_example):
  """Means of resampled seeds, and of resampled examples within them."""
  rng = np.random.default_rng(0)
  n, examples = by_example.shape
  means = np.empty(RESAMPLES)
  for i in range(RESAMPLES):
    seeds = rng.integers(n, size=n)
    if examples == 1:
      means[i] = by_example[seeds, 0].mean()
    else:
      drawn = rng.integers(examples, size=(n, examples))
      means[i] = np.take_along_axis(by_example[seeds], drawn, axis=1).mean()
  return means


def smallest_difference(spread: float, n: int, power: float = 0.8) -> float:
  """Smallest mean difference that a paired t-test of n seeds finds.

  Args:
    spread: Standard deviation of the differences over seeds.
    n: Seeds, at least 2.
    power: Probability of finding it at the 5% level, two-sided.

  Returns:
    The difference, in the units of `spread`.
  """
  if n < 2:
    raise ValueError(f"n={n}: expected at least 2 seeds")
  limit = stats.t.ppf((1 + LEVEL) / 2, n - 1)

  # The other side of the test adds less than 1e-8 at the powers asked for.
  shift = optimize.brentq(
    lambda x: stats.nct.sf(limit, n - 1, x) - power, 0.0, 3 * limit + 10
  )
  return float(shift * spread / np.sqrt(n))


def holm(p_values: Sequence[float]) -> list[float]:
  """Adjusts p-values of a family of claims (Holm's step-down procedure)."""
  p = np.asarray(p_values, float)
  order = np.argsort(p)
  factors = np.arange(p.size, 0, -1)
  adjusted = np.minimum(np.maximum.accumulate(factors * p[order]), 1.0)
  result = np.empty(p.size)
  result[order] = adjusted
  return result.tolist()


def verdict(difference: Difference, adjusted_p: float) -> str:
  """Verdict on the claim that a is better than b.

  Args:
    difference: Of a and b.
    adjusted_p: Its p-value, adjusted for all claims made (`holm`).

  Returns:
    "holds" or "fails" where the difference is significant, to one side or to
    the other, else "undecided".
  """
  if not adjusted_p < 1 - LEVEL or difference.low <= 0 <= difference.high:
    return "undecided"
  return "holds" if difference.mean > 0 else "fails"
