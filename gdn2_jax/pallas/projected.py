"""Norms and gates of the layer, computed as kernels load their inputs.

With `rates`, the arguments q, k, b, g and w of a kernel are the outputs of the
layer's linear maps and convolutions, and the kernel computes (section 3.5)

  q / sqrt(sum q^2 + eps), the same for k       b = erase_scale sigmoid(b)
  g = rate softplus(g + dt_bias)                w = sigmoid(w)

with rate = -exp(A_log), so they need no pass over memory of their own. Every
exponent is <= 0. Gradients are those of the kernel's arguments.
"""

import jax.numpy as jnp
from jax import lax

EPS = 1e-6  # as in gdn2_jax.ops.norm.l2_norm

# log(1 + e) / e for 0 <= e <= 1 in powers of e, fitted for the least relative
# error: 3.6e-7 in float32. log(1 + e) itself loses the digits of a small e.
_LOG1P = (
  *(0.99999982, -0.49997404, 0.33275479, -0.2449545),
  *(0.17745204, -0.10768117, 0.04408924, -0.0085390965),
)


def sigmoid(x):
  """1 / (1 + exp(-x))."""
  e = jnp.exp(-jnp.abs(x))
  # 1 / (1 + e) by rsqrt: one instruction, of which a division takes ten.
  root = lax.rsqrt(1.0 + e)
  return jnp.where(x < 0, e, 1.0) * root * root


def sigmoid_and_slope(x):
  """sigmoid(x) and its derivative, which does not cancel as 1 - sigmoid(x)."""
  e = jnp.exp(-jnp.abs(x))
  root = lax.rsqrt(1.0 + e)
  most = root * root
  return jnp.where(x < 0, e, 1.0) * most, e * most * most


def sigmoids(x):
  """sigmoid(x) and sigmoid(-x), without the cancellation of 1 - sigmoid(x)."""
  e = jnp.exp(-jnp.abs(x))
  most = 1.0 / (1.0 + e)
  least = e * most
  return jnp.where(x < 0, least, most), jnp.where(x < 0, most, least)


def softplus(x):
  """log(1 + exp(x))."""
  e = jnp.exp(-jnp.abs(x))
  series = jnp.full_like(e, _LOG1P[-1])
  for coefficient in reversed(_LOG1P[:-1]):
    series = series * e + coefficient
  return jnp.maximum(x, 0.0) + e * series
