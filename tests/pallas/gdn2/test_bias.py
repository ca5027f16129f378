"""The mean error of the kernels' results: no rounding leans one way.

Errors that lean one way add up over chunks and layers, where others average
out. Every head of one call is a seed of its own. For every result two mean
errors of a head, relative to its RMS: with the sign of the error (towards plus
infinity) and with that of the exact value (away from zero). Over the heads,
each has a t-statistic; that of an unbiased result has mean zero.
"""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from tests import numerics
from tests.pallas.gdn2.test_chunk_kernels import interpreted, kernels

# Of the kernels, whose interpreter takes 3 s a head. Emulated with 8 heads, one
# truncated operand (S in dE; Kd or dS in dR; Kd, Aqk in scan) gives statistics
# of 30 to 70; those of A, E, Y, and S in R stay below the limit. With 64 heads
# (206 s) the largest of the kernels was 3.33, of a limit of 4.32.
HEADS = 7
NAMES = (*numerics.OUTPUTS, *numerics.GRADIENTS)
DIRECTIONS = "up", "away from zero"
# That an unbiased result exceeds a limit, in any statistic of any name.
CHANCE = 1e-3


def make_heads(heads, dtype=jnp.bfloat16):
  """Heads of one chunk, over which they decay by e^-4."""
  rng = np.random.default_rng(0)
  return numerics.make_case(
    rng, T=64, H=heads, K=64, V=64, g=(-0.125, 0.0), dtype=dtype
  )


def t_statistics(actual, exact):
  """Mean error over its standard error, by name and direction."""
  found = {}
  for name, x in exact.items():
    axis = 1 if name.endswith("state") else 2
    x, y = (
      np.moveaxis(np.asarray(z, np.float64), axis, 0).reshape(z.shape[axis], -1)
      for z in (x, actual[name])
    )
    size = np.sqrt(np.mean(x * x, axis=1, keepdims=True))
    for direction, sign in zip(DIRECTIONS, (1, np.sign(x)), strict=True):
      means = np.mean((y - x) * sign / size, axis=1)
      error = means.std(ddof=1) / np.sqrt(len(means))
      found[name, direction] = means.mean() / error
  return found


def limit(heads):
  """|t| that one of all statistics exceeds with CHANCE at most."""
  tail = CHANCE / (2 * len(NAMES) * len(DIRECTIONS))
  return scipy.stats.t.ppf(1 - tail, heads - 1)


def biased(statistics, heads):
  """The statistics beyond the limit."""
  return {n: t for n, t in statistics.items() if abs(t) > limit(heads)}


@pytest.mark.slow
def test_no_result_is_biased():
  case = make_heads(HEADS)
  actual = interpreted(numerics.evaluate, kernels, case)
  found = t_statistics(actual, numerics.oracle(case))
  assert set(found) == {(n, d) for n in NAMES for d in DIRECTIONS}
  assert not biased(found, HEADS), found


def round_to_nearest(bits):
  return bits + 0x7FFF + ((bits >> 16) & 1)


def truncate(bits):
  return bits


@pytest.mark.parametrize(
  ("rounding", "is_biased"), [(round_to_nearest, False), (truncate, True)]
)
def test_one_truncated_operand_is_found(rounding, is_biased):
  # float64 but for one operand with 16 bits.
  heads = 16
  case = make_heads(heads, np.float32)
  exact = numerics.oracle(case)
  bits = rounding(case["k"].view(np.uint32)) & np.uint32(0xFFFF0000)
  found = t_statistics(
    numerics.oracle(case | {"k": bits.view(np.float32)}), exact
  )
  names = {name for name, _ in biased(found, heads)}
  assert ({"o", "dk", "db", "dg"} <= names) if is_biased else not names, found
