"""Rotary embedding against complex rotation in float64."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.ops.attention.rope import apply_rope


def rotate(x, positions, base):
  """Channel i and channel i + D/2 as one complex number."""
  half = x.shape[-1] // 2
  z = x[..., :half] + 1j * x[..., half:]
  angle = positions[:, :, None, None] * base ** (-np.arange(half) / half)
  z = z * np.exp(1j * angle)
  return np.concatenate([z.real, z.imag], axis=-1)


@pytest.fixture
def x(rng):
  return rng.normal(size=(2, 7, 3, 8)).astype(np.float32)


@pytest.mark.parametrize("base", [10000.0, 500.0])
@pytest.mark.parametrize("last", [10, 4096, 1_000_000])
def test_matches_complex_rotation(x, rng, base, last):
  positions = rng.integers(0, last, x.shape[:2])
  positions[0, 0] = last
  out = apply_rope(jnp.asarray(x), jnp.asarray(positions), base=base)
  exact = rotate(x.astype(np.float64), positions, base)
  # One float32 product: the angle is off by at most last * 2^-23 radians.
  radius = np.sqrt(x[..., :4] ** 2 + x[..., 4:] ** 2).max()
  limit = radius * (last * 2.0**-23 + 4 * 2.0**-23)
  assert np.max(np.abs(out - exact)) < limit


def test_position_zero_is_the_identity(x):
  out = apply_rope(jnp.asarray(x), jnp.zeros((2, 7), jnp.int32))
  np.testing.assert_array_equal(out, x)


def test_scores_depend_on_distance_alone(rng):
  """In float64, so that what is left is rounding and not the angle."""
  with jax.enable_x64(True):
    q, k = (jnp.asarray(rng.normal(size=(1, 6, 2, 16))) for _ in range(2))
    positions = jnp.asarray(rng.integers(0, 100, (1, 6)))

    def scores(shift):
      turned = [apply_rope(a, positions + shift) for a in (q, k)]
      return jnp.einsum("bthd,bshd->bhts", *turned)

    np.testing.assert_allclose(scores(0), scores(12345), atol=1e-10)
    turned = apply_rope(q, positions), apply_rope(k, positions + 1)
    moved = jnp.einsum("bthd,bshd->bhts", *turned)
    assert np.max(np.abs(moved - scores(0))) > 0.1


def test_gradient_is_the_inverse_rotation(x, rng):
  positions = jnp.asarray(rng.integers(0, 50, x.shape[:2]))
  _, vjp = jax.vjp(lambda a: apply_rope(a, positions), jnp.asarray(x))
  d_out = rng.normal(size=x.shape).astype(np.float32)
  exact = rotate(d_out.astype(np.float64), -np.asarray(positions), 10000.0)
  np.testing.assert_allclose(vjp(jnp.asarray(d_out))[0], exact, atol=3e-5)


def test_bfloat16_turns_in_float32(x, rng):
  positions = rng.integers(0, 4096, x.shape[:2])
  rounded = jnp.asarray(x, jnp.bfloat16)
  out = apply_rope(rounded, jnp.asarray(positions))
  exact = rotate(np.asarray(rounded, np.float64), positions, 10000.0)
  assert out.dtype == jnp.bfloat16
  error = np.abs(np.asarray(out, np.float64) - exact)
  assert np.all(error < 2.0**-8 * np.abs(exact) + 4e-3)
  floor = np.abs(np.asarray(jnp.asarray(exact, jnp.bfloat16)) - exact)
  assert np.sqrt(np.mean(error**2)) < 1.1 * np.sqrt(np.mean(floor**2))


@pytest.mark.parametrize(
  ("change", "name"),
  [
    ({"x": jnp.ones((2, 7, 3, 5))}, "x"),
    ({"x": jnp.ones((2, 7, 8))}, "x"),
    ({"positions": jnp.zeros((2, 6), jnp.int32)}, "positions"),
    ({"positions": jnp.zeros((2, 7))}, "positions"),
    ({"base": 1.0}, "base"),
  ],
)
def test_bad_inputs_are_named(change, name):
  args = {
    "x": jnp.ones((2, 7, 3, 8)),
    "positions": jnp.zeros((2, 7), jnp.int32),
    **change,
  }
  with pytest.raises(ValueError, match=f"^{name}: expected"):
    inspect.unwrap(apply_rope)(**args)
