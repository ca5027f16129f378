"""Norms and gates of the layer, computed as kernels load their inputs.

With `rates`, the arguments q, k, b, g and w of a kernel are the outputs of the
layer's linear maps and convolutions, and the kernel computes (section 3.5)

  q / sqrt(sum q^2 + eps), the same for k       b = erase_scale sigmoid(b)
  g = rate softplus(g + dt_bias)                w = sigmoid(w)

with rate = -exp(A_log), so they need no pass over memory of their own.
Gradients are those of the kernel's arguments.
"""

import math

import jax.numpy as jnp
from jax import lax

from gdn2_jax.pallas import inline

EPS = 1e-6  # as in gdn2_jax.ops.norm.l2_norm

# log2(1 + e) / e for 0 <= e <= 1 in powers of e, fitted for the least relative
# errors: 1.4e-6, 8.5e-6 and 5.7e-5. The logarithm itself loses the digits of a
# small e.
_LOG2_1P_SEVEN = (
  *(1.4426932, -0.72115947, 0.47766838, -0.33908903),
  *(0.21528455, -0.095797549, 0.020401185),
)
_LOG2_1P_SIX = (
  *(1.4426829, -0.72042616, 0.46917406),
  *(-0.3030362, 0.14603289, -0.034435907),
)
_LOG2_1P_FIVE = (
  *(1.4426132, -0.7169874, 0.44189885),
  *(-0.22711945, 0.05965154),
)
# log(1 + e) / e, with an error of 3.6e-7.
_LOG_1P = (
  *(0.99999982, -0.49997404, 0.33275479, -0.2449545),
  *(0.17745204, -0.10768117, 0.04408924, -0.0085390965),
)
_LOG2_E = math.log2(math.e)
LN_2 = math.log(2)


def sigmoid(x, layout=None):
  """1 / (1 + exp(-x)); where exp(-x) is infinite, exactly 0, its limit.

  Args:
    x: float32.
    layout: See _reciprocal.
  """
  return _reciprocal(1.0 + jnp.exp(-x), layout)


def sigmoid_and_slope(x, layout=None):
  """sigmoid(x) and its derivative, which does not cancel as 1 - sigmoid(x)."""
  e, r = _exp_and_reciprocal(x, layout)
  return jnp.where(x < 0, e, 1.0) * r, e * r * r


def slope_of_sigmoid(x, layout=None):
  """The derivative alone."""
  e, r = _exp_and_reciprocal(x, layout)
  return e * r * r


def _exp_and_reciprocal(x, layout):
  """exp(-|x|) and 1 / (1 + exp(-|x|))."""
  if layout is None:
    e = jnp.exp(-jnp.abs(x))
  else:
    e = inline.exp2_of_minus_abs(x * _LOG2_E, layout)
  return e, _reciprocal(1.0 + e, layout)


def _reciprocal(x, layout):
  """1 / x for x >= 1: one instruction for arrays in a layout of registers."""
  if layout is not None:
    return inline.reciprocal(x, layout)
  root = lax.rsqrt(x)  # a division takes ten instructions
  return root * root


def sigmoids(x):
  """sigmoid(x) and sigmoid(-x), without the cancellation of 1 - sigmoid(x)."""
  e = jnp.exp(-jnp.abs(x))
  most = 1.0 / (1.0 + e)
  least = e * most
  return jnp.where(x < 0, least, most), jnp.where(x < 0, most, least)


def softplus(x):
  """log(1 + exp(x))."""
  e = jnp.exp(-jnp.abs(x))
  return jnp.maximum(x, 0.0) + e * _series(e, _LOG_1P)


def log_decay(f, rate, bias, layout):
  """rate * softplus(f + bias), with a relative error of 1.4e-6."""
  x = f * _LOG2_E + bias * _LOG2_E
  return rate * LN_2 * _log2_1p_exp2(x, _LOG2_1P_SEVEN, layout)


def log2_decay(f, rate, bias, layout):
  """log2 of exp(g) for g = rate softplus(f + bias).

  The relative error is 8.5e-6: little for the decays of a chunk.
  """
  x = f * _LOG2_E + bias * _LOG2_E
  return rate * _log2_1p_exp2(x, _LOG2_1P_SIX, layout)


def softplus_and_slope(f, bias, layout):
  """log2(1 + exp(x)) of x = f + bias, and the derivative of softplus.

  The relative error is 5.7e-5, for gradients. Times `LN_2` the first is
  softplus.
  """
  x = f * _LOG2_E + bias * _LOG2_E
  plus = _log2_1p_exp2(x, _LOG2_1P_FIVE, layout)
  return plus, jnp.exp2(x - plus)


def _log2_1p_exp2(x, terms, layout):
  e = inline.exp2_of_minus_abs(x, layout)
  return jnp.maximum(x, 0.0) + e * _series(e, terms)


def _series(e, terms):
  *terms, series = terms
  for coefficient in reversed(terms):
    series = series * e + coefficient
  return series
