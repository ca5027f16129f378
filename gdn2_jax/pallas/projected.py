"""Norms and gates of the layer, computed where kernels load their inputs.

With `rates` given, q, k, b, g and w of a kernel are what the layer's maps and
convolutions put out, and the kernel itself takes (section 3.5)

  q / sqrt(sum q^2 + eps), the same for k       b = erase_scale sigmoid(b)
  g = rate softplus(g + dt_bias)                w = sigmoid(w)

with rate = -exp(A_log), so that no pass over memory is spent on them. Every
exponent is <= 0. Gradients are those of what was put in.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from gdn2_jax.pallas import blocks

EPS = 1e-6  # that of gdn2_jax.ops.norm.l2_norm

# Of log(1 + e) = 2 artanh(t), t = e / (2 + e) <= 1/3, in powers of t^2: the
# first term left out is 2e-9 of the sum. A logarithm would lose small e.
_ARTANH = tuple(2 / n for n in range(1, 17, 2))


def sigmoid(x):
  """1 / (1 + exp(-x))."""
  e = jnp.exp(-jnp.abs(x))
  return jnp.where(x < 0, e, 1.0) / (1.0 + e)


def sigmoids(x):
  """sigmoid(x) and sigmoid(-x), which 1 - sigmoid(x) would cancel to."""
  e = jnp.exp(-jnp.abs(x))
  most = 1.0 / (1.0 + e)
  least = e * most
  return jnp.where(x < 0, least, most), jnp.where(x < 0, most, least)


def softplus(x):
  """log(1 + exp(x))."""
  e = jnp.exp(-jnp.abs(x))
  t = e / (2.0 + e)
  square = t * t
  series = jnp.full_like(t, _ARTANH[-1])
  for coefficient in reversed(_ARTANH[:-1]):
    series = series * square + coefficient
  return jnp.where(x > 0, x, 0.0) + t * series


def log_decay(f, rates_ref):
  """g, softplus(x) and sigmoid(x) of x = f + dt_bias, all [C, TILE].

  Args:
    f: [C, TILE], float32.
    rates_ref: [2, TILE] in shared memory: rate, dt_bias.
  """
  rate, x = load_rate(rates_ref, 0), f + load_rate(rates_ref, 1)
  plus = softplus(x)
  return rate * plus, plus, sigmoid(x)


def load_rate(rates_ref, n):
  """rate or dt_bias of a warpgroup's channels as a [C, TILE] tile."""
  return blocks.of_columns(
    plgpu.load(rates_ref.at[n], layout=blocks.ROWS.reduce(0))
  )


def store_share(x, shares_ref, wg):
  """Stores a warpgroup's share of the sums of x [C, TILE] over channels."""
  shares_ref.at[wg][...] = x.sum(axis=1)


def load_sum(shares_ref, tiles):
  """The sums of all shares, as a [C, TILE] tile."""
  total = sum(
    plgpu.load(shares_ref.at[n], layout=blocks.ROWS.reduce(1))
    for n in range(tiles)
  )
  return blocks.of_rows(total)


def inverse_norm(shares_ref, tiles):
  """1 / sqrt(sum x^2 + eps) of every row, from the shares of sum x^2."""
  return lax.rsqrt(load_sum(shares_ref, tiles) + EPS)
