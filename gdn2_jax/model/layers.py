"""Linear maps, embedding, norm and MLP, every parameter with logical axes.

The axis names are resolved to mesh axes by `gdn2_jax.sharding.RULES`; nothing
here knows of a mesh.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from gdn2_jax.ops import norm

Initializer = Callable[..., Array]


def xavier_uniform(gain: float, in_dims: int = 1) -> Initializer:
  """U(-a, a) with a = gain * sqrt(6 / (fan_in + fan_out))."""
  return _variance_scaling(gain**2, "fan_avg", in_dims)


def fan_in_uniform(gain: float = 1.0, in_dims: int = 1) -> Initializer:
  """U(-a, a) with a = gain / sqrt(fan_in), the default of torch's Linear."""
  return _variance_scaling(gain**2 / 3.0, "fan_in", in_dims)


def _variance_scaling(scale: float, mode: str, in_dims: int) -> Initializer:
  def init(key, shape, dtype=jnp.float32):
    in_axes = tuple(range(in_dims))
    out_axes = tuple(range(in_dims, len(shape)))
    draw = jax.nn.initializers.variance_scaling(
      scale, mode, "uniform", in_axis=in_axes, out_axis=out_axes
    )
    return draw(key, shape, dtype)

  return init


def init_a_log(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
  """Logarithm of U(1, 16)."""
  return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, 16.0))


def init_dt_bias(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
  """Inverse softplus of dt, log-uniform in [1e-3, 1e-1], at least 1e-4."""
  low, high = math.log(1e-3), math.log(1e-1)
  dt = jnp.exp(jax.random.uniform(key, shape, dtype, low, high))
  dt = jnp.maximum(dt, 1e-4)
  return dt + jnp.log(-jnp.expm1(-dt))


class Linear(nn.Module):
  """x[..., in...] times kernel[in..., out...].

  Attributes:
    features: sizes of the output axes.
    axes: logical names of the kernel's axes, input axes first.
    kernel_init: initializer that knows the number of input axes.
    has_bias: whether to return a bias of shape `features`, zero at first,
      beside the product: the caller adds it, fused into its own kernel.
    dtype: dtype of the product; the parameters are cast to it.
    param_dtype: dtype of the parameters.
  """

  features: tuple[int, ...]
  axes: tuple[str, ...]
  kernel_init: Initializer
  has_bias: bool = False
  dtype: str = "float32"
  param_dtype: str = "float32"

  @nn.compact
  def __call__(self, x: Array) -> Array | tuple[Array, Array]:
    in_dims = len(self.axes) - len(self.features)
    kernel = self.param(
      "kernel",
      nn.with_logical_partitioning(self.kernel_init, self.axes),
      (*x.shape[-in_dims:], *self.features),
      jnp.dtype(self.param_dtype),
    )
    contract = (
      tuple(range(x.ndim - in_dims, x.ndim)),
      tuple(range(in_dims)),
    )
    y = jax.lax.dot_general(
      x.astype(self.dtype), kernel.astype(self.dtype), (contract, ((), ()))
    )
    if not self.has_bias:
      return y
    bias = self.param(
      "bias",
      nn.with_logical_partitioning(
        nn.initializers.zeros_init(), self.axes[in_dims:]
      ),
      self.features,
      jnp.dtype(self.param_dtype),
    )
    return y, bias


class RMSNorm(nn.Module):
  """Root-mean-square norm over the last axis with a learned weight."""

  eps: float = 1e-5
  param_dtype: str = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
    weight = self.param(
      "weight",
      nn.with_logical_partitioning(nn.initializers.ones_init(), ("act_embed",)),
      (x.shape[-1],),
      jnp.dtype(self.param_dtype),
    )
    return norm.rms_norm(x, weight, eps=self.eps)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _lookup(table, tokens, dtype):
  """Rows of the table in `dtype`; their gradients are summed in float32."""
  # Filling with NaN turns a token that is out of range into a loud failure
  # where clamping would train on the wrong row.
  return jnp.take(table.astype(dtype), tokens, axis=0, mode="fill")


@_lookup.defjvp
def _lookup_jvp(dtype, primals, tangents):
  """Casts after the gather, so that the scatter it transposes to is float32.

  A sum of bfloat16 stops growing once a term is below half its last bit: 256
  equal terms are as far as it gets, and what is lost depends on the order. The
  value itself is gathered in `dtype`, which is all that devices then exchange.
  """
  (table, tokens), (dtable, _) = primals, tangents
  dtable = dtable.astype(jnp.promote_types(dtable.dtype, jnp.float32))
  rows = jnp.take(dtable, tokens, axis=0, mode="fill", fill_value=0)
  return _lookup(table, tokens, dtype), rows.astype(dtype)


class Embedding(nn.Module):
  """Token table [VOCAB, D], N(0, 0.02); ids out of range give NaN."""

  vocab_size: int
  model_dim: int
  dtype: str = "float32"
  param_dtype: str = "float32"

  @nn.compact
  def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    table = self.param(
      "table",
      nn.with_logical_partitioning(
        nn.initializers.normal(0.02), ("vocab", "embed")
      ),
      (self.vocab_size, self.model_dim),
      jnp.dtype(self.param_dtype),
    )
    # Each device looks its channels of the table up, for the tokens of all the
    # devices that share the table; an all-to-all then gives every device its
    # rows, and another, where rows are split as well, its tokens of them, with
    # all their channels. Unless the stops on the way are named, XLA may find
    # no way from one end to the other but to replicate the activations.
    tokens = nn.with_logical_constraint(tokens, ("lookup", None))
    x = _lookup(table, tokens, self.dtype)
    x = nn.with_logical_constraint(x, ("lookup", None, "embed"))
    return nn.with_logical_constraint(x, ("batch", None, "lookup_embed"))


class SwiGLU(nn.Module):
  """down(silu(gate x) * up x) of hidden width F = `dim`.

  The initial `down` shrinks with the number of layers of the model.
  """

  dim: int
  num_layers: int
  dtype: str = "float32"
  param_dtype: str = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    width = (self.dim,)
    gate = Linear(
      width, ("embed", "mlp"), fan_in_uniform(), name="gate", **types
    )(x)
    up = Linear(width, ("embed", "mlp"), fan_in_uniform(), name="up", **types)(
      x
    )
    h = nn.with_logical_constraint(
      jax.nn.silu(gate) * up, ("batch", "length", "mlp")
    )
    shrink = fan_in_uniform(1.0 / math.sqrt(2.0 * self.num_layers))
    return Linear(
      (x.shape[-1],), ("mlp", "embed"), shrink, name="down", **types
    )(h)
