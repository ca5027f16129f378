"""The decode kernel in the interpreter of Mosaic GPU, against Eq. 10."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.core import jaxprs_in_params
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax._src.state.types import WriteEffect

from gdn2_jax.kernels import target
from gdn2_jax.pallas.gdn2 import step
from tests import numerics

DTYPES = (
  jnp.float32,
  jnp.bfloat16,
  pytest.param(jnp.float16, marks=pytest.mark.deep),
)
INPUTS = numerics.INPUTS


def interpret(call, *args):
  """Runs in the interpreter; a race fails on every version of JAX."""
  with target.use("interpret"):
    try:
      outputs = jax.block_until_ready(call(*args))
      assert not interpret_pallas_call.get_races().races_found
    finally:
      interpret_pallas_call.reset_gpu_interpret_mode_state()
  return outputs


def one_token(rng, **kwargs):
  return numerics.make_case(rng, T=1, **kwargs)


def run(case, **kwargs) -> dict:
  """All tokens of a case, one by one; o and state as in the oracle.

  The states are those of the second of three layers; others must stay.
  """
  state, outputs = jnp.asarray(case["initial_state"]), []
  others = jnp.full_like(state, jnp.nan)
  states = jnp.stack([others, state, others])
  for t in range(case["q"].shape[1]):
    token = [jnp.asarray(case[n][:, t]) for n in INPUTS]
    call = functools.partial(
      step.gdn2_step_mosaic_gpu, layer=1, scale=case["scale"], **kwargs
    )
    o, states = interpret(call, *token, states)
    outputs.append(o)
  assert jnp.isnan(states[::2]).all()
  return {"o": jnp.stack(outputs, axis=1), "final_state": states[1]}


def assert_exact(actual: dict, case: dict):
  """Float32 accuracy; o may add no more than the rounding to its dtype."""
  exact = {n: numerics.oracle(case)[n] for n in numerics.OUTPUTS}
  bound = dict.fromkeys(numerics.OUTPUTS, numerics.FLOAT32_BOUND)
  dtype = case["v"].dtype
  assert actual["o"].dtype == dtype
  assert actual["final_state"].dtype == jnp.float32
  if dtype != np.float32:
    rounded = exact["o"].astype(dtype).astype(np.float64)
    floor = numerics.rel_rms(rounded, exact["o"])
    bound["o"] = numerics.LOW_PRECISION_FACTOR * floor
  numerics.assert_close(actual, exact, bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: x.__name__)
@pytest.mark.parametrize(
  ("K", "V"),
  [(16, 16), (64, 64), (128, 128), (256, 64), (64, 512), (48, 48)],
)
def test_a_token_equals_the_recurrence(K, V, dtype, rng):
  case = one_token(rng, B=2, H=1, K=K, V=V, dtype=dtype)
  assert_exact(run(case), case)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: x.__name__)
@pytest.mark.parametrize("g", [0.0, -50.0, -200.0, (-88.0, -80.0), -3e38])
def test_any_decay(g, dtype, rng):
  case = one_token(rng, B=1, H=1, K=64, V=32, g=g, dtype=dtype)
  assert_exact(run(case), case)


def test_minus_infinity_clears_a_channel(rng):
  case = one_token(rng, B=1, H=1, K=16, V=32)
  case["g"][..., ::2] = -np.inf
  case["k"][..., ::2] = 0  # nothing is written where all is forgotten
  actual = run(case)
  assert_exact(actual, case)
  state = np.asarray(actual["final_state"])
  assert np.all(state[:, :, ::2] == 0) and np.all(state[:, :, 1::2] != 0)


def test_decay_alone_is_as_exact_as_float32(rng):
  # Nothing is written: the state has the error of alpha and no other.
  case = one_token(rng, B=1, H=1, K=64, V=32, g=(-75.0, -0.01))
  case["w"][:] = 0
  case["b"][:] = 0
  exact = numerics.oracle(case)["final_state"]
  error = np.abs(np.asarray(run(case)["final_state"], np.float64) / exact - 1)
  assert error.max() < 4 * np.finfo(np.float32).eps


def test_negative_eigenvalues(rng):
  case = one_token(rng, B=2, H=1, K=64, V=32, b=2.0, g=(-0.1, 0.0))
  assert_exact(run(case), case)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: x.__name__)
def test_tokens_in_a_row(dtype, rng):
  case = numerics.make_case(rng, B=2, T=5, H=2, K=32, V=32, dtype=dtype)
  assert_exact(run(case), case)


def test_dtypes_may_differ(rng):
  case = one_token(rng, B=1, H=1, K=32, V=32, dtype=jnp.bfloat16)
  for name in "qb":
    case[name] = case[name].astype(np.float32)
  case["g"] = case["g"].astype(jnp.bfloat16)
  assert_exact(run(case), case)


def test_value_heads_share_a_key_head(rng):
  case = one_token(rng, B=2, H=2, K=16, V=32, value_heads=3)
  grouped = run(case)
  assert_exact(grouped, case)
  # Side by side in one state, as other implementations take them.
  state = case["initial_state"].reshape(2, 2, 3, 16, 32).swapaxes(2, 3)
  folded = case | {"initial_state": state.reshape(2, 2, 16, 96)}
  for name in "vw":
    folded[name] = case[name].reshape(2, 1, 2, 96)
  o = np.asarray(run(folded)["o"])
  np.testing.assert_array_equal(o.reshape(grouped["o"].shape), grouped["o"])


@pytest.mark.parametrize("tile", [16, 32, 64, 128])
def test_every_tile(tile, rng):
  case = one_token(rng, B=1, H=2, K=32, V=128)
  assert_exact(run(case, tile=tile), case)


def lower(name) -> str:
  """A representative call as it is handed to XLA for a GPU."""
  [(call, args)] = [(f, a) for n, f, a in step.aot_cases() if n == name]
  with target.use("compile"):
    traced = jax.jit(call, donate_argnums=6).trace(*args)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_the_state_is_updated_in_place():
  text = lower("step B=1")
  assert text.count("stablehlo.custom_call") == 1
  alias = "<output_tuple_indices = [1], operand_index = 6"
  assert alias in text


def test_the_old_state_is_not_written():
  # XLA may give an aliased call two buffers, one to read and one to write.
  _, call, args = step.aot_cases()[0]
  with target.use("compile"):
    jaxpr = jax.make_jaxpr(call)(*args)
  [body] = kernels(jaxpr.jaxpr)
  inputs = set(body.invars[: len(args)])
  written = {e.input for e in body.effects if isinstance(e, WriteEffect)}
  assert written and not written & inputs


def kernels(jaxpr):
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "mpmd_map":
      yield from eqn.params["jaxprs"]
    else:
      for sub in jaxprs_in_params(eqn.params):
        yield from kernels(sub)


def test_what_is_compiled_ahead_of_time_is_supported():
  cases = step.aot_cases()
  names = [name for name, _, _ in cases]
  assert len(set(names)) == len(names)
  for _, call, args in cases:
    K, V = args[6].shape[3:]
    dtypes = [x.dtype for x in args[:6]]
    assert step.step_unsupported_reason(K, V, *dtypes) is None
    o, state = jax.eval_shape(call, *args)
    assert (o.shape, o.dtype) == (args[2].shape, args[2].dtype)
    assert (state.shape, state.dtype) == (args[6].shape, jnp.float32)


@pytest.mark.parametrize(
  ("K", "V", "dtype", "word"),
  [
    (24, 32, jnp.float32, "K = 24"),
    (272, 32, jnp.float32, "K = 272"),
    (32, 24, jnp.float32, "V = 24"),
    (32, 32, np.float64, "float64"),
  ],
)
def test_a_reason_for_what_is_not_supported(K, V, dtype, word):
  assert word in step.step_unsupported_reason(K, V, dtype)


def test_what_is_not_supported_raises(rng):
  case = one_token(rng, B=1, H=1, K=24, V=32)
  with pytest.raises(NotImplementedError, match="mosaic_gpu: K = 24"):
    run(case)
