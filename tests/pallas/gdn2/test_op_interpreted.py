"""The public op down to the kernels, in the CPU interpreter.

What the kernels compute is tested kernel by kernel; here: that a call with
everything in it (grouped value heads, channels and tokens that need padding,
segments, padding that holds NaN, a state) arrives and comes back right.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.kernels import target
from gdn2_jax.ops.gdn2.api import gdn2, select_implementation
from tests import numerics

# The kernels multiply 16-bit operands where the token scan has float32: one
# rounding step of bfloat16, in any output.
BOUND = 2**-7


@pytest.mark.slow
def test_a_call_with_everything_in_it(rng):
  padding = slice(40, 50)
  segments = np.array([[1] * 40 + [0] * 10 + [2] * 80], np.int32)
  case = numerics.make_case(
    rng,
    T=130,
    H=1,
    K=32,
    V=48,
    value_heads=2,
    dtype=jnp.bfloat16,
    g=(-5.0, 0.0),
    segments=segments,
  )
  exact = numerics.oracle(case)
  for name in numerics.INPUTS:
    case[name][:, padding] = np.nan

  def run(inputs, state, segment_ids, scale):
    return gdn2(*inputs, state=state, segment_ids=segment_ids, scale=scale)

  with target.use("interpret"):
    chosen = select_implementation(*(case[n] for n in numerics.INPUTS))
    assert chosen == "mosaic_gpu"
    actual = numerics.evaluate(run, case)
  assert not np.asarray(actual["o"], np.float32)[:, padding].any()
  numerics.assert_close(actual, exact, BOUND)
