"""The op's accuracy, compiled quickly and, among deep tests, as users compile.

Ground truth: the float64 vectors of tests/vectors and the float64 recurrence of
tests/numerics.py. Every output and every gradient is compared by name.
"""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from tests import numerics

VECTORS = pathlib.Path(__file__).parents[2] / "vectors"
EXACT = (*numerics.OUTPUTS, *numerics.GRADIENTS)
IMPLEMENTATIONS = ("reference", "xla")


@pytest.fixture(
  scope="module",
  autouse=True,
  params=["quick", pytest.param("optimized", marks=pytest.mark.deep)],
)
def programs(request):
  """Programs of the tests of this module, with fewer optimizations or all."""
  if request.param == "optimized":
    request.getfixturevalue("optimized")


def load_vector(name: str) -> tuple[dict, dict]:
  with np.load(VECTORS / f"{name}.npz") as file:
    vector = dict(file)
  return vector, {n: vector[n] for n in EXACT}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
  "name", sorted(p.stem for p in VECTORS.glob("gdn2_*.npz"))
)
def test_vectors(name, implementation):
  case, exact = load_vector(name)
  actual = numerics.evaluate(numerics.op(implementation), case)
  numerics.assert_close(actual, exact)


@pytest.mark.parametrize("name", ["gdn2_ragged_kv", "gdn2_packed"])
def test_the_oracle_agrees_with_the_vectors(name):
  case, exact = load_vector(name)
  # The vectors are stored in float32, which rounds at 6e-8.
  numerics.assert_close(numerics.oracle(case), exact, 1e-7)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("b", [None, 2.0])
def test_low_precision_inputs(dtype, b, rng):
  case = numerics.make_case(
    rng, T=150, b=b, g=(-1.0, -0.001), dtype=jnp.dtype(dtype)
  )
  exact = numerics.oracle(case)
  floor = numerics.evaluate(numerics.op("reference"), case)
  actual = numerics.evaluate(numerics.op("xla"), case)
  assert actual["o"].dtype == actual["dq"].dtype == dtype
  assert actual["final_state"].dtype == actual["dg"].dtype == jnp.float32
  # What is returned in float32 is held to the float32 contract.
  bound = {
    n: numerics.FLOAT32_BOUND
    if floor[n].dtype == jnp.float32
    else numerics.LOW_PRECISION_FACTOR * numerics.rel_rms(floor[n], x)
    for n, x in exact.items()
  }
  numerics.assert_close(actual, exact, bound)
