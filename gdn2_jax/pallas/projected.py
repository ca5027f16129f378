"""Norms and gates of the layer, computed as kernels load their inputs.

With `rates`, the arguments q, k, b, g and w of a kernel are the outputs of the
layer's linear maps and convolutions, and the kernel computes (section 3.5)

  q / sqrt(sum q^2 + eps), the same for k       b = erase_scale sigmoid(b)
  g = rate softplus(g + dt_bias)                w = sigmoid(w)

with rate = -exp(A_log), so they need no pass over memory of their own.
Gradients are those of the kernel's arguments.
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
# The same with errors of 8.5e-6 and 5.7e-5, for gradients.
_SIX_TERMS = (
  *(0.9999916, -0.49936137, 0.32520668),
  *(-0.21004869, 0.10122228, -0.023869152),
)
_FIVE_TERMS = (
  *(0.9999433, -0.4969778, 0.30630094),
  *(-0.1574272, 0.0413473),
)
_MOST = 80.0  # exp of it is finite


def sigmoid(x):
  """1 / (1 + exp(-x)), and exactly 0 where exp(-x) is infinite."""
  # By rsqrt: one instruction, of which a division takes ten.
  root = lax.rsqrt(1.0 + jnp.exp(-x))
  return root * root


def slope_of_sigmoid(x):
  """Derivative of sigmoid(x), which does not cancel as 1 - sigmoid(x)."""
  e = jnp.exp(-jnp.abs(x))
  root = lax.rsqrt(1.0 + e)
  most = root * root
  return e * most * most


def sigmoid_and_slope(x):
  """sigmoid(x) and its derivative, which does not cancel as 1 - sigmoid(x)."""
  e = jnp.exp(-jnp.maximum(x, -_MOST))
  root = lax.rsqrt(1.0 + e)
  s = root * root
  return s, e * s * s


def sigmoids(x):
  """sigmoid(x) and sigmoid(-x), without the cancellation of 1 - sigmoid(x)."""
  e = jnp.exp(-jnp.abs(x))
  most = 1.0 / (1.0 + e)
  least = e * most
  return jnp.where(x < 0, least, most), jnp.where(x < 0, most, least)


def softplus(x):
  """log(1 + exp(x))."""
  return _softplus(x, jnp.exp(-jnp.abs(x)), _LOG1P)


def softplus_to_5_digits(x):
  """log(1 + exp(x)), with a relative error of 8.5e-6."""
  return _softplus(x, jnp.exp(-jnp.abs(x)), _SIX_TERMS)


def softplus_and_slope(x):
  """log(1 + exp(x)) with a relative error of 5.7e-5, and its derivative."""
  e = jnp.exp(-jnp.abs(x))
  root = lax.rsqrt(1.0 + e)
  slope = jnp.where(x < 0, e, 1.0) * root * root
  return _softplus(x, e, _FIVE_TERMS), slope


def _softplus(x, e, terms):
  series = jnp.full_like(e, terms[-1])
  for coefficient in reversed(terms[:-1]):
    series = series * e + coefficient
  return jnp.maximum(x, 0.0) + e * series
