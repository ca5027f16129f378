"""The norms against float64, values and gradients by name."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.ops.norm import gated_rms_norm, l2_norm, rms_norm
from tests.numerics import rel_rms

# Measured: 1.2e-7 at most for any value or gradient below, float32 rounding
# of a few operations each.
FLOAT32_LIMIT = 5e-7


def l2_oracle(x, d_out, eps):
  r = 1 / np.sqrt(np.sum(x * x, -1, keepdims=True) + eps)
  out = x * r
  d_x = r * d_out - x * r**3 * np.sum(x * d_out, -1, keepdims=True)
  return out, (d_x,)


def gated_oracle(x, gate, weight, d_out, activation, eps):
  """activation None: no gate at all."""
  r = 1 / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps)
  sigmoid = 1 / (1 + np.exp(-gate))
  if activation == "silu":
    act, d_act = gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid))
  elif activation == "sigmoid":
    act, d_act = sigmoid, sigmoid * (1 - sigmoid)
  else:
    act, d_act = np.ones_like(x), np.zeros_like(x)
  normed = x * r
  out = normed * weight * act
  d_weight = np.sum(d_out * normed * act, axis=tuple(range(x.ndim - 1)))
  d_gate = d_out * normed * weight * d_act
  d_normed = d_out * weight * act
  inner = np.mean(x * d_normed, -1, keepdims=True)
  d_x = r * d_normed - x * r**3 * inner
  return out, (d_x, d_gate, d_weight)


@pytest.fixture
def arrays(rng):
  x = rng.normal(size=(2, 5, 3, 16)) * np.exp(rng.normal(size=(2, 5, 3, 1)))
  gate = rng.normal(size=x.shape) * 3
  weight = 1 + 0.3 * rng.normal(size=16)
  d_out = rng.normal(size=x.shape)
  return [a.astype(np.float32) for a in (x, gate, weight, d_out)]


def wide(arrays):
  return [a.astype(np.float64) for a in arrays]


def check(fn, args, d_out, oracle, names, limit=FLOAT32_LIMIT):
  out, vjp = jax.vjp(fn, *map(jnp.asarray, args))
  exact, exact_grads = oracle
  assert rel_rms(out, exact) < limit
  for name, grad, want in zip(
    names, vjp(jnp.asarray(d_out)), exact_grads, strict=True
  ):
    assert rel_rms(grad, want) < limit, name


def test_l2_norm_values_and_gradient(arrays):
  x, _, _, d_out = arrays
  oracle = l2_oracle(*wide([x, d_out]), 1e-6)
  check(l2_norm, [x], d_out, oracle, ["x"])


def test_rms_norm_values_and_gradients(arrays):
  x, gate, weight, d_out = arrays
  out, (d_x, _, d_weight) = gated_oracle(
    *wide([x, gate, weight, d_out]), None, 1e-5
  )
  check(rms_norm, [x, weight], d_out, (out, (d_x, d_weight)), ["x", "weight"])


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_gated_rms_norm_values_and_gradients(arrays, activation):
  x, gate, weight, d_out = arrays
  check(
    lambda *a: gated_rms_norm(*a, activation=activation),
    [x, gate, weight],
    d_out,
    gated_oracle(*wide([x, gate, weight, d_out]), activation, 1e-5),
    ["x", "gate", "weight"],
  )


@pytest.mark.parametrize("shape", [(16,), (3, 16)])
def test_the_bias_of_the_gate(arrays, shape, rng):
  x, gate, weight, d_out = arrays
  bias = rng.normal(size=shape).astype(np.float32)
  wide_x, wide_gate, wide_weight, wide_bias, wide_d = wide(
    [x, gate, weight, bias, d_out]
  )
  out, grads = gated_oracle(
    wide_x, wide_gate + wide_bias, wide_weight, wide_d, "silu", 1e-5
  )
  d_bias = grads[1].sum(tuple(range(x.ndim - bias.ndim)))
  check(
    lambda x, gate, weight, bias: gated_rms_norm(x, gate, weight, bias=bias),
    [x, gate, weight, bias],
    d_out,
    (out, (*grads, d_bias)),
    ["x", "gate", "weight", "bias"],
  )


def test_float64_stays_float64(arrays):
  x, gate, weight, d_out = wide(arrays)
  with jax.enable_x64(True):
    check(
      gated_rms_norm,
      [x, gate, weight],
      d_out,
      gated_oracle(x, gate, weight, d_out, "silu", 1e-5),
      ["x", "gate", "weight"],
      limit=1e-14,
    )


def test_bfloat16_rounds_once(arrays):
  """The arithmetic is float32: only the result is rounded."""
  x, gate, weight, d_out = arrays
  x, gate = (jnp.asarray(a, jnp.bfloat16) for a in (x, gate))
  rounded = wide([np.asarray(a, np.float32) for a in (x, gate, weight)])
  exact = gated_oracle(*rounded, d_out, "silu", 1e-5)[0]
  floor = rel_rms(jnp.asarray(exact, jnp.bfloat16), exact)
  out = gated_rms_norm(x, gate, jnp.asarray(weight))
  assert out.dtype == jnp.bfloat16
  assert rel_rms(out, exact) < 1.01 * floor
  out = l2_norm(x)
  exact = l2_oracle(rounded[0], d_out, 1e-6)[0]
  floor = rel_rms(jnp.asarray(exact, jnp.bfloat16), exact)
  assert out.dtype == jnp.bfloat16
  assert rel_rms(out, exact) < 1.01 * floor


def test_eps_keeps_zero_vectors_at_zero():
  zeros = jnp.zeros((2, 4))
  for fn in (l2_norm, lambda x: rms_norm(x, jnp.ones(4))):
    out, vjp = jax.vjp(fn, zeros)
    np.testing.assert_array_equal(out, 0)
    assert np.all(np.isfinite(vjp(jnp.ones((2, 4)))[0]))
  np.testing.assert_allclose(
    l2_norm(jnp.full((1,), 1e-3), eps=1e-6), 0.5**0.5, rtol=1e-6
  )


@pytest.mark.parametrize(
  ("call", "name"),
  [
    (lambda x, w: inspect.unwrap(l2_norm)(x.astype(jnp.int32)), "x"),
    (lambda x, w: inspect.unwrap(l2_norm)(jnp.float32(1)), "x"),
    (lambda x, w: l2_norm(x, eps=0.0), "eps"),
    (lambda x, w: inspect.unwrap(rms_norm)(x, w[:-1]), "weight"),
    (lambda x, w: rms_norm(x, w, eps=-1.0), "eps"),
    (lambda x, w: inspect.unwrap(gated_rms_norm)(x, x[:1], w), "gate"),
    (lambda x, w: gated_rms_norm(x, x, w, bias=w[:-1]), "bias"),
    (
      lambda x, w: inspect.unwrap(gated_rms_norm)(x, x, w, activation="relu"),
      "activation",
    ),
  ],
)
def test_bad_inputs_are_named(call, name):
  with pytest.raises(ValueError, match=f"^{name}: expected"):
    call(jnp.ones((2, 4)), jnp.ones(4))
