"""Numerics failures known from other implementations, one test each.

N1 to N20 name the failures; "xla" is under test, float64 is the truth.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.ops.gdn2.api import gdn2, gdn2_step
from gdn2_jax.ops.gdn2.xla_tree import chunk_tree
from tests import numerics

XLA = numerics.op("xla")
# One shape for most tests, so that they share one compilation.
SHAPE = {"B": 1, "T": 80, "H": 2, "K": 16, "V": 24}


def make(rng, **kwargs):
  return numerics.make_case(rng, **(SHAPE | kwargs))


@pytest.mark.parametrize(
  "chunk_size", [16, pytest.param(64, marks=pytest.mark.deep)]
)
@pytest.mark.parametrize("g", [(-5.0, -0.1), (-40.0, 0.0)], ids=str)
def test_n01_masked_scores_leave_gradients_finite(g, chunk_size, rng):
  case = make(rng, g=g)
  actual = numerics.evaluate(numerics.op("xla", chunk_size), case)
  numerics.assert_close(actual, numerics.oracle(case))


@pytest.mark.parametrize("g", [-0.5, -1, -2.5, -3, -5, -10, -40])
def test_n02_error_is_flat_in_the_decay(g, rng):
  case = make(rng, g=float(g))
  # 3e-7 measured at every g; K/gamma in the open would overflow at 88/16.
  actual = numerics.evaluate(XLA, case)
  numerics.assert_close(actual, numerics.oracle(case), 2e-6)


def test_n03_a_forgotten_channel_stays_forgotten(rng):
  case = make(rng, g=(-0.1, 0.0))
  case["g"][:, 40, :, 3] = -400
  case["v"][:, :40] *= 1e3
  actual = numerics.evaluate(XLA, case)
  numerics.assert_close(actual, numerics.oracle(case))


@pytest.mark.parametrize("chunk_size", [16, 64])
def test_n04_a_prefix_does_not_see_later_edits_in_any_bit(chunk_size, rng):
  case = make(rng)
  case["dfinal_state"][:] = 0
  other = make(np.random.default_rng(1), g=(-40.0, 0.0))
  run = numerics.op("xla", chunk_size)
  for p in range(33, 33 + 16):
    # The loss sees the prefix only, and everything after it is edited.
    do = np.array(case["do"])
    do[:, p:] = 0
    edited = {"do": do}
    for name in numerics.INPUTS:
      edited[name] = np.concatenate(
        [case[name][:, :p], other[name][:, p:]], axis=1
      )
    first = numerics.evaluate(run, case | {"do": do})
    second = numerics.evaluate(run, case | edited)
    for name in ("o", *numerics.GRADIENTS):
      tokens = slice(0, None if name == "dinitial_state" else p)
      np.testing.assert_array_equal(
        first[name][:, tokens], second[name][:, tokens], err_msg=name
      )


@pytest.mark.parametrize("chunk_size", [16, 64])
def test_n05_decay_gradient_does_not_cancel(chunk_size, rng):
  case = make(rng, g=(-5.0, -0.1))
  actual = numerics.evaluate(numerics.op("xla", chunk_size), case)
  assert numerics.rel_rms(actual["dg"], numerics.oracle(case)["dg"]) < 1e-6


def test_n06_gradients_are_not_biased():
  signed = {name: [] for name in numerics.GRADIENTS}
  for seed in range(24):
    case = make(np.random.default_rng(seed))
    exact = numerics.oracle(case)
    actual = numerics.evaluate(XLA, case)
    for name, errors in signed.items():
      error = np.asarray(actual[name], np.float64) - exact[name]
      # Toward or away from zero, relative to the size of the whole gradient.
      toward = np.mean(error * np.sign(exact[name]))
      errors.append(toward / np.sqrt(np.mean(exact[name] ** 2)))
  for name, errors in signed.items():
    # Float32 rounds at 6e-8; a bias well below it cannot drive training.
    assert abs(np.mean(errors)) < 2e-8, f"{name}: {np.mean(errors):.1e}"


def test_n07_the_same_inputs_give_the_same_bits(rng):
  case = make(rng)
  first = numerics.evaluate(XLA, case)
  for _ in range(100):
    again = numerics.evaluate(XLA, case)
    for name, x in first.items():
      np.testing.assert_array_equal(again[name], x, err_msg=name)


@pytest.mark.parametrize("erase", [1.0, 2.0])
@pytest.mark.parametrize("C", [16, 64])
def test_n08_the_inverse_is_exact_for_correlated_keys(C, erase, rng):
  k = numerics.unit(np.ones((1, 1, C, 16)) + 0.1 * rng.normal(size=(C, 16)))
  k = jnp.asarray(k, jnp.float32)
  tree = jax.jit(chunk_tree)(jnp.ones_like(k), erase * k, k, k)
  A = np.asarray(tree.A[0, 0], np.float64)
  k64 = np.asarray(k[0, 0], np.float64)
  T = np.tril(erase * k64 @ k64.T, -1)
  assert np.abs(T).max() > 0.9
  residual = (np.eye(C) + T) @ A - np.eye(C)
  # With b = 2 the entries of A alternate between 2 and -2 and cancel in sums
  # of C terms. T and A are both float32: in each sum both have C entries of at
  # most 2, wrong by 2^-24 of themselves. How much of that a machine shows
  # depends on the order in which its products sum.
  bound = 1e-6 if erase == 1 else C * 2 * (2 * 2 * 2.0**-24)
  assert np.abs(residual).max() < bound


@pytest.mark.parametrize("b", [1.0, 2.0])
def test_n09_repeated_keys_do_not_amplify_errors(b, rng):
  case = make(rng, T=4096, H=1, V=16, g=0.0, b=b)
  case["k"][:] = case["k"][:, :1]
  case["do"][:] = 0
  actual = numerics.evaluate(XLA, case, gradients=False)
  exact = numerics.oracle(case)
  # With b = 2 and g = 0 the state along k never decays, and because every
  # chunk is the same chunk, T rounds the same way each time: errors add up
  # instead of averaging. An entry of T is a dot product of K terms of one
  # sign; each of the log2(K) levels of its sum errs by half an ulp of 2.
  levels = np.log2(case["k"].shape[-1])
  drift = 4096 * levels * float(np.finfo(np.float32).eps)
  bound = numerics.FLOAT32_BOUND if b == 1 else drift
  numerics.assert_close(actual, {n: exact[n] for n in numerics.OUTPUTS}, bound)


def test_n09_a_thousand_steps_equal_the_chunks(rng):
  case = make(rng, T=1024, H=1, g=(-0.1, 0.0))
  inputs = tuple(jnp.asarray(case[n]) for n in numerics.INPUTS)

  @jax.jit
  def decode(state, inputs):
    def one(state, token):
      o, state = gdn2_step(*token, state)
      return state, o

    tokens = tuple(jnp.moveaxis(x, 1, 0) for x in inputs)
    state, o = jax.lax.scan(one, state, tokens)
    return {"o": jnp.moveaxis(o, 0, 1), "final_state": state}

  steps = decode(jnp.asarray(case["initial_state"]), inputs)
  chunks = numerics.evaluate(XLA, case, gradients=False)
  numerics.assert_close(steps, chunks)


@pytest.mark.parametrize("spread", [0.0, 1e-3])
@pytest.mark.parametrize(
  "dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.deep)]
)
def test_n10_no_decay_and_parallel_keys(dtype, spread, rng):
  case = make(rng, g=0.0, b=1.0, dtype=jnp.dtype(dtype))
  keys = case["k"][:, :1].astype(np.float32)
  keys = numerics.unit(keys + spread * rng.normal(size=case["k"].shape))
  case["k"] = keys.astype(case["k"].dtype)
  case["w"][:] = 1
  exact = numerics.oracle(case)
  floor = numerics.evaluate(numerics.op("reference"), case)
  bound = {
    n: max(
      numerics.FLOAT32_BOUND,
      numerics.LOW_PRECISION_FACTOR * numerics.rel_rms(floor[n], x),
    )
    for n, x in exact.items()
  }
  numerics.assert_close(numerics.evaluate(XLA, case), exact, bound)


@pytest.mark.slow
def test_n11_negative_eigenvalues_stay_bounded(rng):
  case = make(rng, T=16384, H=1, V=16, g=-1e-4, b=2.0)
  case["v"][:, 1000:] = 0
  case["do"][:] = 0
  exact = numerics.oracle(case)
  exact = {n: exact[n] for n in numerics.OUTPUTS}
  actual = numerics.evaluate(XLA, case, gradients=False)
  floor = numerics.evaluate(numerics.op("reference"), case, gradients=False)
  # Next to nothing decays, so that 16384 tokens of rounding are all still
  # there: the token scan, too, is at 3e-4.
  bound = {
    n: numerics.LOW_PRECISION_FACTOR * numerics.rel_rms(floor[n], x)
    for n, x in exact.items()
  }
  numerics.assert_close(actual, exact, bound)
  assert np.abs(actual["o"]).max() < 2 * np.abs(exact["o"]).max()


def test_n12_gate_gradients_are_finite_at_any_rate(rng):
  case = make(rng)
  x = jnp.asarray(rng.normal(size=case["g"].shape), jnp.float32)
  q, k, v, _, b, w = (jnp.asarray(case[n]) for n in numerics.INPUTS)

  @jax.jit
  @jax.grad
  def gradient(params):
    A_log, x = params
    g = -jnp.exp(A_log) * jax.nn.softplus(x)
    return jnp.sum(jnp.square(gdn2(q, k, v, g, b, w)[0]))

  for A_log in (-10.0, 0.0, 5.0, 10.0, 20.0):
    dA_log, dx = gradient((jnp.float32(A_log), x))
    assert np.isfinite(dA_log) and np.isfinite(dx).all(), A_log
    assert dA_log != 0 or A_log > 5


def test_n13_pairs_on_the_diagonal_have_no_decay_gradient(rng):
  case = make(rng, T=16)
  # Token t lives in channel t: no two tokens ever meet.
  case["k"][:] = np.eye(16, dtype=np.float32)[None, :, None]
  case["q"][:] = case["k"]
  case["initial_state"][:] = 0
  case["dfinal_state"][:] = 0
  actual = numerics.evaluate(XLA, case)
  assert np.asarray(actual["dq"]).any() and np.asarray(actual["dv"]).any()
  assert not np.asarray(actual["dg"]).any()


def test_n13_saturated_gates(rng):
  case = make(rng, g=-5.0)
  actual = numerics.evaluate(XLA, case)
  assert numerics.rel_rms(actual["dg"], numerics.oracle(case)["dg"]) < 1e-6


@pytest.mark.slow
def test_n14_poisoned_padding_at_every_length(rng):
  clean = make(rng, g=(-1.0, 0.0))
  for length in range(1, 65):
    ids = np.ones((1, SHAPE["T"]), np.int32)
    ids[:, length:] = 0
    case = clean | {"segment_ids": ids}
    poisoned = dict(case)
    for name in (*numerics.INPUTS, "do"):
      poisoned[name] = np.array(case[name])
      poisoned[name][:, length:] = np.nan
    if length % 8 == 1:
      exact = numerics.oracle(case)
      numerics.assert_close(numerics.evaluate(XLA, case), exact)
    expected = numerics.evaluate(XLA, case)
    actual = numerics.evaluate(XLA, poisoned)
    for name, x in expected.items():
      np.testing.assert_array_equal(actual[name], x, err_msg=name)


@pytest.mark.slow
def test_n15_sums_of_gate_gradients_keep_their_precision(rng):
  case = make(rng, B=16, T=1024, H=1, V=16, dtype=jnp.bfloat16)
  actual = numerics.evaluate(XLA, case)
  assert actual["dg"].dtype == jnp.float32
  bias = jnp.sum(actual["dg"], axis=(0, 1))
  exact = np.sum(numerics.oracle(case)["dg"], axis=(0, 1))
  assert numerics.rel_rms(bias, exact) < numerics.FLOAT32_BOUND


@pytest.mark.parametrize(
  "value_heads", [2, pytest.param(4, marks=pytest.mark.deep)]
)
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_n16_value_heads_read_their_key_head(implementation, value_heads, rng):
  case = make(rng, T=65, value_heads=value_heads)
  actual = numerics.evaluate(numerics.op(implementation), case)
  numerics.assert_close(actual, numerics.oracle(case))


def test_n17_growing_gates_are_refused(rng):
  case = make(rng)
  case["g"][0, 3, 1, 2] = 1e-3
  with pytest.raises(ValueError, match=r"g: got a maximum of 0\.001"):
    gdn2(*(jnp.asarray(case[n]) for n in numerics.INPUTS))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_n18_large_states(dtype, rng):
  case = make(rng, g=(-0.01, 0.0), dtype=jnp.dtype(dtype))
  case["initial_state"] *= 1e6  # float16 ends at 65504
  case["q"] *= case["q"].dtype.type(1e-3)
  case["w"][:] = 0
  actual = numerics.evaluate(XLA, case, gradients=False)
  exact = numerics.oracle(case)
  numerics.assert_close(actual, {"final_state": exact["final_state"]})
  floor = numerics.evaluate(numerics.op("reference"), case, gradients=False)
  bound = numerics.rel_rms(floor["o"], exact["o"])
  numerics.assert_close(
    actual, {"o": exact["o"]}, numerics.LOW_PRECISION_FACTOR * bound
  )


def test_n19_a_singular_transition(rng):
  case = make(rng, g=0.0, b=1.0)
  case["k"] = numerics.unit(case["k"].astype(np.float64)).astype(np.float32)
  # I - k k^T has rank K - 1: a backward pass must not invert it.
  actual = numerics.evaluate(XLA, case)
  numerics.assert_close(actual, numerics.oracle(case))


@pytest.mark.gpu
def test_n20_many_heads_and_large_tensors(rng):
  case = make(rng, B=1, T=16, H=2)
  rows = 32768  # B * H = 65536
  inputs = tuple(jnp.asarray(case[n]) for n in numerics.INPUTS)
  many = tuple(jnp.tile(x, (rows, 1, 1, 1)) for x in inputs)
  alone, _ = gdn2(*inputs)
  o, _ = jax.jit(gdn2)(*many)
  for row in (0, 1, rows // 2, rows - 1):
    assert numerics.rel_rms(o[row], alone[0]) < numerics.FLOAT32_BOUND
  # One input of more than 4 GiB.
  long = tuple(jnp.tile(x, (1, 2**21, 1, 1)) for x in inputs)
  assert long[0].nbytes >= 2**32
  whole, state = jax.jit(gdn2)(*long)
  tail = tuple(x[:, -4096:] for x in long)
  end, end_state = gdn2(*tail)
  assert numerics.rel_rms(state, end_state) < numerics.FLOAT32_BOUND
  assert numerics.rel_rms(whole[:, -16:], end[:, -16:]) < 1e-5


@pytest.mark.gpu
def test_float32_on_a_gpu_is_not_tf32(rng):
  case = make(rng)
  numerics.assert_close(numerics.evaluate(XLA, case), numerics.oracle(case))
