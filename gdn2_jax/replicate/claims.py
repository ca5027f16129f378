"""Claims, written down before any run, and their tests.

The claims are those of the Gated DeltaNet-2 paper in the terms of the synthetic
tasks. A test compares mean scores of mixers, paired by seed. A claim holds if
all its tests hold, fails if one fails, and is undecided otherwise.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from gdn2_jax.eval.statistics import (
  LEVEL,
  Difference,
  holm,
  paired_difference,
  verdict,
)

MARGIN = 0.02  # accuracies that differ by less are called equal

# Scores by (task, mixer, group or "acc") and seed.
Scores = Mapping[tuple[str, str, str], Mapping[int, float]]


@dataclasses.dataclass(frozen=True)
class Test:
  """Comparison on one task, of the means of two sets of mixers.

  Attributes:
    task: Name of the task.
    better: Mixers that the claim puts first.
    worse: Mixers they are compared with.
    score: "acc", or the name of a group of queries.
    kind: "greater"; "equal", within MARGIN; or "none": no order is claimed.
  """

  __test__ = False  # pytest takes the name for a test's

  task: str
  better: tuple[str, ...]
  worse: tuple[str, ...]
  score: str = "acc"
  kind: str = "greater"

  def __str__(self) -> str:
    sign = {"greater": ">", "equal": "=", "none": "against"}[self.kind]
    score = "" if self.score == "acc" else f", {self.score} keys"
    sides = (self.better, self.worse)
    left, right = (
      "mean(" + ", ".join(s) + ")" if len(s) > 1 else s[0] for s in sides
    )
    return f"{self.task}{score}: {left} {sign} {right}"


@dataclasses.dataclass(frozen=True)
class Claim:
  """A statement and the tests that decide it."""

  name: str
  text: str
  tests: tuple[Test, ...]


_ERASING = ("gdn2", "kda", "gdn")

CLAIMS = (
  Claim(
    "C1",
    "Erasing matters: mixers that erase keep the newest value of a key that is"
    " written again.",
    (
      Test("overwrite", _ERASING, ("mamba2",), "hot"),
      Test("overwrite", _ERASING, ("no_erase",), "hot"),
    ),
  ),
  Claim(
    "C2",
    "Decay by channel is better than one decay per head.",
    (Test("setadd", ("kda",), ("gdn",)), Test("reset", ("kda",), ("gdn",))),
  ),
  Claim(
    "C3",
    "Erase and write gates of their own are better than one tied gate.",
    (
      Test("setadd", ("gdn2",), ("kda",)),
      Test("overwrite", ("gdn2",), ("kda",)),
    ),
  ),
  Claim(
    "C4",
    "A channel-wise erase gate is worth more than a channel-wise write gate.",
    (
      Test("setadd", ("b_only",), ("w_only",)),
      Test("overwrite", ("b_only",), ("w_only",)),
    ),
  ),
  Claim(
    "C5",
    f"An erase gate in [0, 2] is as good as in [0, 1], within {MARGIN}.",
    (
      Test("setadd", ("erase_0_2",), ("gdn2",), kind="equal"),
      Test("overwrite", ("erase_0_2",), ("gdn2",), kind="equal"),
    ),
  ),
  Claim(
    "C6",
    "Recall at capacity: the paper claims no order; it is measured.",
    (
      Test("recall", ("gdn2",), ("kda",), kind="none"),
      Test("recall", ("gdn2",), ("gdn",), kind="none"),
      Test("recall", ("gdn2",), ("mamba2",), kind="none"),
    ),
  ),
)


@dataclasses.dataclass(frozen=True)
class Result:
  """Result of a test.

  Attributes:
    test: The test.
    difference: Of the means; None if fewer than two common seeds are there.
    adjusted_p: Adjusted for all tests of all claims (Holm); nan where no order
      is claimed.
    verdict: "holds", "fails", "undecided", "measured" or "not run".
  """

  test: Test
  difference: Difference | None
  adjusted_p: float
  verdict: str


def evaluate(
  scores: Scores, claims: Sequence[Claim] = CLAIMS
) -> list[tuple[Claim, str, list[Result]]]:
  """Tests all claims on the scores that are there.

  Args:
    scores: Final scores of the reported seeds.
    claims: Claims that make up the family of tests.

  Returns:
    (claim, verdict, results of its tests), in the order of the claims. Tests
    that were not run do not count in a verdict.
  """
  tests = [test for claim in claims for test in claim.tests]
  differences = [_difference(test, scores) for test in tests]
  counted = [
    i
    for i, (test, d) in enumerate(zip(tests, differences, strict=True))
    if d is not None and test.kind != "none"
  ]
  p_values = holm([_p_value(tests[i], differences[i]) for i in counted])
  adjusted = dict(zip(counted, p_values, strict=True))
  results = [
    Result(test, d, adjusted.get(i, np.nan), _verdict(test, d, adjusted.get(i)))
    for i, (test, d) in enumerate(zip(tests, differences, strict=True))
  ]
  found, first = [], 0
  for claim in claims:
    own = results[first : first + len(claim.tests)]
    first += len(claim.tests)
    found.append((claim, _of_all([r.verdict for r in own]), own))
  return found


def _difference(test: Test, scores: Scores) -> Difference | None:
  sides = [
    [scores.get((test.task, mixer, test.score), {}) for mixer in mixers]
    for mixers in (test.better, test.worse)
  ]
  seeds = set.intersection(*(set(by_seed) for s in sides for by_seed in s))
  if len(seeds) < 2:
    return None
  a, b = (
    np.array([[by_seed[s] for by_seed in side] for s in sorted(seeds)])
    for side in sides
  )
  return paired_difference(a.mean(axis=1), b.mean(axis=1))


def _p_value(test: Test, d: Difference) -> float:
  if test.kind == "greater":
    return d.p
  # Two one-sided t-tests: equal if both reject a difference of MARGIN or more.
  error = d.error
  if error == 0:
    return float(abs(d.mean) >= MARGIN)
  return float(stats.t.sf((MARGIN - abs(d.mean)) / error, d.n - 1))


def _verdict(test: Test, d: Difference | None, adjusted: float | None) -> str:
  if d is None:
    return "not run"
  if test.kind == "none":
    return "measured"
  if test.kind == "greater":
    return verdict(d, adjusted)
  if adjusted < 1 - LEVEL:
    return "holds"
  return "fails" if d.low > MARGIN or d.high < -MARGIN else "undecided"


def _of_all(verdicts: Sequence[str]) -> str:
  ran = [v for v in verdicts if v != "not run"]
  if not ran:
    return "not run"
  for name in ("fails", "undecided"):
    if name in ran:
      return name
  return ran[0]
