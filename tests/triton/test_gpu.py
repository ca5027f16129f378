"""The Triton kernels on a GPU against float64, or refused where they cannot."""

import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.ops.gdn2.api import gdn2_step
from gdn2_jax.ops.gdn2.dispatch import unsupported_reason
from tests import numerics

SEGMENTS = np.array([[1, 1, 0, 2, 2, 1, 0, 0, 3], [0, 4, 4, 4, 4, 0, 4, 2, 2]])

pytestmark = pytest.mark.gpu


def step(inputs, state, segment_ids, scale):
  assert segment_ids is None
  token = (x[:, 0] for x in inputs)
  o, state = gdn2_step(*token, state, scale=scale, implementation="triton")
  return o[:, None], state


def check(run, case):
  inputs = [case[name] for name in numerics.INPUTS]
  if unsupported_reason("triton", *inputs) is not None:
    with pytest.raises(NotImplementedError, match="triton: "):
      numerics.evaluate(run, case, gradients=False)
    return
  exact = numerics.oracle(case)
  actual = numerics.evaluate(run, case, gradients=False)
  bound = numerics.FLOAT32_BOUND
  if case["v"].dtype != np.float32:
    scan = numerics.op("reference")
    floor = numerics.evaluate(scan, case, gradients=False)["o"]
    o_bound = numerics.LOW_PRECISION_FACTOR * numerics.rel_rms(
      floor, exact["o"]
    )
    bound = {"o": o_bound, "final_state": bound}
  numerics.assert_close(actual, {n: exact[n] for n in numerics.OUTPUTS}, bound)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("segments", [None, SEGMENTS])
@pytest.mark.parametrize(("K", "V"), [(16, 16), (48, 40), (128, 128)])
def test_sequence(rng, K, V, segments, dtype):
  case = numerics.make_case(
    rng, B=2, T=9, K=K, V=V, value_heads=2, segments=segments, dtype=dtype
  )
  check(numerics.op("triton"), case)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("g", [(-200.0, 0.0), 0.0])
@pytest.mark.parametrize(("K", "V"), [(24, 33), (128, 128), (256, 64)])
def test_step(rng, K, V, g, dtype):
  case = numerics.make_case(rng, B=2, T=1, K=K, V=V, g=g, dtype=dtype)
  check(step, case)
