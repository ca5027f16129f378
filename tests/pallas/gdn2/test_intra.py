"""intra: one chunk in the interpreter, against float64 and bit by bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.pallas.gdn2.intra import intra
from tests import numerics
from tests.pallas.gdn2.test_chunk_kernels import (
  CONTRACT,
  error_ratios,
  interpreted,
)

pytestmark = pytest.mark.slow

C, SCALE = 64, 0.1
BFLOAT16 = jnp.bfloat16
NAMES = ("Y_neg", "Qg", "Kd", "Aqk", "A", "gamma_C")
PAST = ("Y_neg", "Qg", "Aqk", "A")  # rows of tokens that do not see the future


def make(rng, K=64, g=(-0.5, 0.0), dtype=BFLOAT16):
  """q, k, b, g of one chunk and head, and their kinds."""
  shape = 1, C, 1, K

  def low(x):
    return np.array(jnp.asarray(x, jnp.float32).astype(dtype))

  q, k = (low(numerics.unit(rng.standard_normal(shape))) for _ in range(2))
  b = low(numerics.sigmoid(rng.standard_normal(shape)))
  g = rng.uniform(*g, shape).astype(np.float32)
  return [q, k, b, g, np.ones((1, C), np.int32)]


def packed(x):
  x[4][0, [5, 20, 33]] = 2
  x[4][0, [0, 1, 40, 41, 42, 63]] = 0
  return x


# One program for all tests of a shape: its compilation takes most of the time.
INTRA = jax.jit(lambda *args: intra(*args[:5], SCALE, *args[5:]))


def run(inputs, A=None):
  out = interpreted(INTRA, *inputs, *([] if A is None else [A]))
  return {n: np.asarray(x)[0, 0, 0] for n, x in zip(NAMES, out, strict=True)}


def exact(inputs):
  """float64, with decays as products of what lies between two tokens."""
  q, k, b, g = (np.asarray(x)[0, :, 0].astype(np.float64) for x in inputs[:4])
  padding, restart = ((inputs[4][0] == n)[:, None] for n in (0, 2))
  q, k, b = (np.where(padding, 0, x) for x in (q, k, b))
  a = np.exp(np.where(padding, 0, np.where(restart, -np.inf, g)))
  D = np.zeros((C, C, q.shape[1]))
  for r in range(C):
    D[r, r] = 1
    D[r, :r] = D[r - 1, :r] * a[r]
  gamma, e = np.cumprod(a, axis=0), b * k
  T = np.tril(np.einsum("rk,rsk,sk->rs", e, D, k), -1)
  A = np.linalg.inv(np.eye(C) + T)
  Aqk = np.tril(np.einsum("rk,rsk,sk->rs", SCALE * q, D, k))
  values = -A @ (gamma * e), SCALE * gamma * q, D[-1] * k, Aqk, A, gamma[-1]
  return dict(zip(NAMES, values, strict=True))


def assert_contract(actual, inputs):
  for name, x in exact(inputs).items():
    dtype = np.float32 if name == "gamma_C" else inputs[0].dtype
    error = numerics.rel_rms(actual[name], x)
    rounding = numerics.rel_rms(x.astype(dtype).astype(np.float64), x)
    if name == "gamma_C":  # exp of 64 sums; measured at most 6e-7
      rounding = 1e-6
    assert error <= CONTRACT * rounding, f"{name}: {error / rounding:.2f}"


def assert_same(x, y, names=NAMES, rows=C):
  for name in names:
    one, two = (np.asarray(z[name], np.float32)[:rows] for z in (x, y))
    assert one.any(), name
    np.testing.assert_array_equal(one, two, err_msg=name)


@pytest.mark.parametrize("K", [64, 128])
@pytest.mark.parametrize("g", [(-0.1, 0.0), (-5.0, 0.0), (-200.0, 0.0)])
def test_accuracy(K, g, rng):
  inputs = make(rng, K, g)
  assert_contract(run(inputs), inputs)


def test_padding_and_restarts(rng):
  inputs = packed(make(rng))
  results = []
  for fill in (0.0, np.nan):
    for x in inputs[:4]:
      x[inputs[4] == 0] = fill
    results.append(run(inputs))
  assert_same(*results, names=[n for n in NAMES if n != "gamma_C"])
  for x in inputs[:4]:
    x[inputs[4] == 0] = 0.0
  assert_contract(results[0], inputs)
  # With A given, halves of the channels of Aqk are added in float32; all else
  # is the same to the bit.
  given = run(inputs, results[0]["A"][None, None, None])
  assert_same(results[0], given, names=("Y_neg", "Qg", "Kd", "A"))
  assert_contract(given, inputs)


@functools.cache
def some_chunk():
  """Inputs and results."""
  inputs = make(np.random.default_rng(1))
  return inputs, run(inputs)


@pytest.mark.parametrize("p", [1, 15, 16, 23, 32, 37, 48, 63])
def test_the_future_changes_no_bit(p, rng):
  first, before = some_chunk()
  other = make(rng, g=(-40.0, 0.0))
  changed = [
    np.concatenate([x[:, :p], y[:, p:]], axis=1)
    for x, y in zip(first, other, strict=True)
  ]
  # Beyond float16: factors on later rows must not be those of earlier ones.
  for x, power in zip(changed[:3], (18, 18, -36), strict=True):
    x[:, p:] *= np.asarray(2.0**power, x.dtype)
  assert_same(before, run(changed), PAST, p)


def scaled(inputs, q, k, b):
  changed = list(inputs)
  for n, factor in enumerate((q, k, b)):
    changed[n] = (inputs[n].astype(np.float64) * factor).astype(inputs[n].dtype)
  return changed


@pytest.mark.parametrize("power", [-20, 20])
def test_powers_of_two_change_exponents_only(power, rng):
  # b makes up for k: T and A stay what they are. All rows of both are scaled.
  inputs, f = make(rng), 2.0 ** (power // 5)
  near = 2.0**power
  one = run(scaled(inputs, near, near, near**-2))
  two = run(scaled(inputs, near * f, near * f, (near * f) ** -2))
  factors = {"Y_neg": 1 / f, "Qg": f, "Kd": f, "Aqk": f * f, "A": 1.0}
  for name, factor in factors.items():
    x, y = (z[name].astype(np.float64) for z in (one, two))
    np.testing.assert_array_equal(x * factor, y, err_msg=name)


def spread(rng, shape, decades):
  return 10.0 ** rng.uniform(-decades, decades, shape)


@pytest.mark.parametrize("where", ["channels", "rows", "chunk"])
def test_magnitudes_from_1e_minus_6_to_1e6(where, rng):
  inputs = make(rng)
  shape = {"channels": (1, 1, 1, 64), "rows": (1, C, 1, 1), "chunk": (1,)}[
    where
  ]
  f = spread(rng, shape, 6)
  # With b of order one, T would have entries of 1e12, and its inverse none that
  # is finite. So b is small where the largest k is large.
  inputs = scaled(inputs, spread(rng, shape, 6), f, 1 / f.max() ** 2)
  assert_contract(run(inputs), inputs)


def test_finite_operands_for_all_finite_keys(rng):
  inputs = make(rng)
  inputs = scaled(inputs, 1e15, 1e15, 1e-30)
  inputs[1][0, 5, 0, 7] = -3e18
  for name, x in run(inputs).items():
    assert np.isfinite(x.astype(np.float32)).all(), name


def test_float16(rng):
  inputs = make(rng, dtype=jnp.float16)
  assert_contract(run(inputs), inputs)


@pytest.mark.parametrize("b", [1.0, 2.0])
def test_the_inverse_where_keys_are_alike(b, rng):
  # The only error left is the rounding of A. With unsplit operands it is 9
  # times (b = 1) and 33 times (b = 2) as large.
  key = rng.standard_normal((1, C, 1, 64)) + 3 * rng.standard_normal(64)
  k = np.array(jnp.asarray(numerics.unit(key), BFLOAT16))
  g = np.zeros(k.shape, np.float32)
  A = run([k, k, np.full_like(k, b), g, np.ones((1, C), np.int32)])["A"]
  k = k.astype(np.float64)[0, :, 0]
  exact = np.linalg.inv(np.eye(C) + np.tril(b * k @ k.T, -1))
  ratio = error_ratios({"A": A}, {"A": exact}, A.dtype)["A"]
  assert ratio <= 1.1, ratio
