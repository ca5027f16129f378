"""The two 16-bit parts of a float32 number, bit for bit."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gdn2_jax.pallas import blocks


def nearest_bfloat16(x):
  """Rounded to nearest, ties to even, by integer arithmetic; x is finite."""
  bits = x.view(np.uint32)
  bits = bits + 0x7FFF + (bits >> 16 & 1)
  return (bits >> 16).astype(np.uint16).view(ml_dtypes.bfloat16)


def every_exponent(rng):
  """Of both signs: ends of a binade, ties, their neighbours, random bits."""
  tie = [n << 16 | 0x8000 for n in (0, 1, 2, 3, 126, 127)]
  fractions = [x + step for x in tie for step in (-1, 0, 1)]
  fractions += [0, 1, 0x7FFFFF, *rng.integers(0, 1 << 23, 64)]
  fractions = np.array(fractions, np.uint32)
  exponents = np.arange(255, dtype=np.uint32)[:, None] << 23
  bits = (exponents | fractions).ravel()
  return np.concatenate([bits, bits | 0x80000000]).view(np.float32)


def same_bits(actual, want):
  np.testing.assert_array_equal(
    np.asarray(actual).view(np.uint16), want.view(np.uint16)
  )


@pytest.mark.parametrize("wrapped", [lambda f: f, jax.jit])
def test_bfloat16_parts_of_every_exponent(wrapped, rng):
  x = every_exponent(rng)
  hi, lo = wrapped(lambda x: blocks.split(x, jnp.bfloat16))(x)
  want = nearest_bfloat16(x)
  same_bits(hi, want)
  # Where x rounds to infinity nothing finite is left; below 2^-102 the rest
  # may be flushed to zero.
  rest = x - want.astype(np.float32)
  near = np.isfinite(rest) & (np.abs(x) >= 2.0**-102)
  same_bits(np.asarray(lo)[near], nearest_bfloat16(rest[near]))
  assert near.mean() > 0.85


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_infinity_and_nan_stay_visible(dtype):
  x = jnp.array([np.inf, -np.inf, np.nan], jnp.float32)
  hi, lo = (np.asarray(y, np.float32) for y in blocks.split(x, dtype))
  np.testing.assert_array_equal(hi, x)
  assert np.isnan(lo).all()


def test_float16_parts(rng):
  x = every_exponent(rng)
  x = x[np.abs(x) < 65504]
  hi, lo = blocks.split(jnp.asarray(x), jnp.float16)
  same_bits(hi, x.astype(np.float16))
  near = np.abs(x) >= 2.0**-102
  rest = x - x.astype(np.float16).astype(np.float32)
  same_bits(np.asarray(lo)[near], rest[near].astype(np.float16))
