"""Linear maps, embedding, norm and MLP with logical axis names.

`gdn2_jax.sharding.RULES` maps the logical axes to mesh axes; this module does
not depend on a mesh.
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


def init_a_log(low: float = 1.0, high: float = 16.0) -> Initializer:
  """Logarithm of U(low, high)."""

  def init(key, shape, dtype=jnp.float32):
    return jnp.log(jax.random.uniform(key, shape, dtype, low, high))

  return init


def init_dt_bias(low: float = 1e-3, high: float = 1e-1) -> Initializer:
  """Inverse softplus of dt, log-uniform in [low, high], at least 1e-4."""

  def init(key, shape, dtype=jnp.float32):
    ends = math.log(low), math.log(high)
    dt = jnp.exp(jax.random.uniform(key, shape, dtype, *ends))
    dt = jnp.maximum(dt, 1e-4)
    return dt + jnp.log(-jnp.expm1(-dt))

  return init


def conv_kernel(*, on_current: bool = False) -> Initializer:
  """Taps [W, ...] in U(-1, 1) / sqrt(W), with 1 added to the current token's.

  The addition, if on_current, lets a layer read the current token from its
  first step on, not a mixture of W tokens.
  """

  def init(key, shape, dtype=jnp.float32):
    taps = fan_in_uniform()(key, shape, dtype)
    return taps.at[-1].add(1.0) if on_current else taps

  return init


def conv_bias(width: int) -> Initializer:
  """U(-1, 1) / sqrt(W), the default of torch's depthwise Conv1d."""

  def init(key, shape, dtype=jnp.float32):
    limit = width**-0.5
    return jax.random.uniform(key, shape, dtype, -limit, limit)

  return init


def parameter(
  module: nn.Module,
  name: str,
  init: Initializer,
  axes: tuple[str, ...],
  shape: tuple[int, ...],
  dtype: Any = None,
) -> Array:
  """A module's parameter with logical axes; dtype None is its param_dtype."""
  dtype = jnp.dtype(module.param_dtype if dtype is None else dtype)
  return module.param(
    name, nn.with_logical_partitioning(init, axes), shape, dtype
  )


class Linear(nn.Module):
  """Linear map, x[..., in...] times kernel[in..., out...].

  Attributes:
    features: Sizes of the output axes.
    axes: Logical names of the kernel's axes, input axes first.
    kernel_init: Initializer for that number of input axes.
    has_bias: Also return a bias of shape `features`, initially zero, which the
      caller adds, fused into its own kernel.
    dtype: Dtype of the product; parameters are cast to it.
    param_dtype: Dtype of the parameters.
    min_rows: Rows that a product has at least; copies of x fill them up.
  """

  features: tuple[int, ...]
  axes: tuple[str, ...]
  kernel_init: Initializer
  has_bias: bool = False
  dtype: str = "float32"
  param_dtype: str = "float32"
  min_rows: int = 1

  @nn.compact
  def __call__(self, x: Array) -> Array | tuple[Array, Array]:
    in_dims = len(self.axes) - len(self.features)
    shape = (*x.shape[-in_dims:], *self.features)
    kernel = parameter(self, "kernel", self.kernel_init, self.axes, shape)
    contract = (
      tuple(range(x.ndim - in_dims, x.ndim)),
      tuple(range(in_dims)),
    )
    rows = math.prod(x.shape[:-in_dims])
    if rows < self.min_rows:
      x = jnp.broadcast_to(x[:1], (self.min_rows, *x.shape[1:]))
    y = jax.lax.dot_general(
      x.astype(self.dtype), kernel.astype(self.dtype), (contract, ((), ()))
    )
    if rows < self.min_rows:
      y = y[:1]
    if not self.has_bias:
      return y
    zeros = nn.initializers.zeros_init()
    return y, parameter(self, "bias", zeros, self.axes[in_dims:], self.features)


class RMSNorm(nn.Module):
  """Root-mean-square norm over the last axis with a learned weight."""

  eps: float = 1e-5
  param_dtype: str = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
    ones = nn.initializers.ones_init()
    weight = parameter(self, "weight", ones, ("act_embed",), x.shape[-1:])
    return norm.rms_norm(x, weight, eps=self.eps)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _lookup(table, tokens, dtype):
  """Rows of the table in `dtype`, with gradients summed in float32."""
  # A token out of range gives NaN, which stops the run. The default, clamping,
  # would train on a wrong row.
  return jnp.take(table.astype(dtype), tokens, axis=0, mode="fill")


@_lookup.defjvp
def _lookup_jvp(dtype, primals, tangents):
  """Casts after the gather, so that its transpose, a scatter, is float32.

  A bfloat16 sum stops growing when a term is below half its last bit, for equal
  terms after 256 of them. The value itself is gathered in `dtype`, so devices
  exchange no more bytes.
  """
  (table, tokens), (dtable, _) = primals, tangents
  dtable = dtable.astype(jnp.promote_types(dtable.dtype, jnp.float32))
  rows = jnp.take(dtable, tokens, axis=0, mode="fill", fill_value=0)
  return _lookup(table, tokens, dtype), rows.astype(dtype)


class Embedding(nn.Module):
  """Token table [VOCAB, D], initially N(0, 0.02); wrong ids give NaN."""

  vocab_size: int
  model_dim: int
  dtype: str = "float32"
  param_dtype: str = "float32"

  @nn.compact
  def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    table = parameter(
      self,
      "table",
      nn.initializers.normal(0.02),
      ("vocab", "embed"),
      (self.vocab_size, self.model_dim),
    )
    # Each device looks up its channels of the table, for the tokens of all
    # devices that share the table. An all-to-all then gives every device its
    # rows with all channels; if tokens of a row are split, another gives it its
    # tokens. Without these constraints in between, XLA may replicate the
    # activations to get from the first layout to the last.
    tokens = nn.with_logical_constraint(tokens, ("lookup", None))
    x = _lookup(table, tokens, self.dtype)
    x = nn.with_logical_constraint(x, ("lookup", None, "embed"))
    return nn.with_logical_constraint(x, ("batch", None, "lookup_embed"))


class SwiGLU(nn.Module):
  """MLP down(silu(gate x) * up x) with hidden width F = `dim`.

  The initial size of `down` decreases with num_layers, the model's layers.
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
