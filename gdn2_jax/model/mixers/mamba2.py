"""The Mamba-2 mixer (Dao and Gu 2024, arXiv 2405.21060, section 7).

z, x, B, C, dt = u W_z, u W_x, u W_B, u W_C, u W_dt
x, B, C = silu(conv(x)), silu(conv(B)), silu(conv(C))     with a bias
dt = softplus(dt + dt_bias), A = -exp(A_log)              float32, per head
h_t = exp(A dt_t) h_{t-1} + dt_t B_t x_t^T                the op with b = 0
y_t = h_t^T C_t + D x_t
out = rms_norm(y * silu(z)) W_o                           over all heads

All heads read the same B and C (one group). The reference layer has one
projection and one convolution for z, x, B, C and dt; here every part has its
own, with as many parameters: a mesh splits those of x, z and dt by heads and
copies those of B and C, which one fused array would not allow.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from gdn2_jax.config_class import check_choices, config_class
from gdn2_jax.model import layers
from gdn2_jax.model.mixers.gdn2_config import check_implementation
from gdn2_jax.model.mixers.layer_cache import CacheLayer, as_layer, like
from gdn2_jax.model.on_shards import on_shards
from gdn2_jax.ops.gdn2.api import gdn2, gdn2_step
from gdn2_jax.ops.norm import rms_norm
from gdn2_jax.ops.short_conv import short_conv
from gdn2_jax.typing import Activations, SegmentIds

# Initial ranges of A and of dt; the log-decay of a token is -A dt.
_DECAY_INIT = {
  "paper": ((1.0, 16.0), (1e-3, 1e-1)),
  "long": ((0.01, 0.015), (1e-1, 1.0)),
  "long_small_dt": ((1.0, 1.5), (1e-3, 1e-2)),
}

# Logical axis names of the ops' arrays, for on_shards.
_IDS = ("batch", "length")
_TOKENS = (*_IDS, "heads", None)
_OP = {
  **dict.fromkeys("qkvgbw", _TOKENS),
  "state": ("batch", "heads", None, None),
  "segment_ids": _IDS,
}


@config_class
class Mamba2Config:
  """Config of a Mamba-2 layer.

  Attributes:
    inner_dim: Channels of x and z, all heads together; the reference layer has
      twice the model's width. A multiple of head_dim.
    head_dim: Channels of x in a head, 16 to 256.
    state_dim: Channels of B and C, 16 to 256; a head's state is [state_dim,
      head_dim].
    conv_width: Taps of the short convolution.
    decay_init: Initial decays: "paper", a median half-life of about 8 tokens (A
      in [1, 16], dt in [1e-3, 1e-1]); "long", about 170 (A in [0.01, 0.015], dt
      in [0.1, 1]); or "long_small_dt", the same decays with A in [1, 1.5] and
      dt in [1e-3, 1e-2]. dt also scales what a token writes: in
      "long_small_dt" the state is small beside the skip D x, and the layer
      learns slowly.
    conv_init: "uniform" (the reference), or "current": 1 is added to the tap of
      the current token.
    norm_eps: Added to the mean square in the output norm.
    implementation: Implementation of the op, as in GDN2Config.
  """

  inner_dim: int = 4096
  head_dim: int = 64
  state_dim: int = 64
  conv_width: int = 4
  decay_init: Literal["paper", "long", "long_small_dt"] = "paper"
  conv_init: Literal["uniform", "current"] = "uniform"
  norm_eps: float = 1e-5
  implementation: str = ""

  @property
  def num_heads(self) -> int:
    """Number of heads H."""
    return self.inner_dim // self.head_dim

  @property
  def decay_ranges(self) -> tuple[tuple[float, float], tuple[float, float]]:
    """Initial ranges of A and dt."""
    return _DECAY_INIT[self.decay_init]

  def validate(self, path: str) -> None:
    """Raises ValueError naming the first field under `path` that is wrong."""
    check_sizes(self, path)
    if self.conv_width < 2:
      raise ValueError(f"{path}.conv_width={self.conv_width}: expected >= 2")
    check_choices(self, path)
    check_implementation(self.implementation, path)


def check_sizes(config: Any, path: str) -> None:
  """Refuses head sizes that the op cannot run, for Mamba-2 and Mamba-3."""
  for name in ("head_dim", "state_dim"):
    if not 16 <= getattr(config, name) <= 256:
      raise ValueError(
        f"{path}.{name}={getattr(config, name)}: expected 16 to 256"
      )
  if config.inner_dim < 1 or config.inner_dim % config.head_dim:
    raise ValueError(
      f"{path}.inner_dim={config.inner_dim}: expected a positive multiple of "
      f"head_dim={config.head_dim}"
    )
  if not config.norm_eps > 0:
    raise ValueError(f"{path}.norm_eps={config.norm_eps}: expected > 0")


@struct.dataclass
class Mamba2Cache:
  """State of a Mamba-2 layer, of a size that does not depend on the tokens.

  Attributes:
    state: h [B, H, state_dim, head_dim], float32.
    conv_x, conv_b, conv_c: Last inputs of the convolutions of x, B and C, [B,
      taps - 1, channels].
  """

  # Any: tree transformations put objects other than arrays in these fields.
  state: Any
  conv_x: Any
  conv_b: Any
  conv_c: Any


def init_mamba2_cache(
  config: Mamba2Config, batch_size: int, dtype
) -> Mamba2Cache:
  """Cache before the first token, all zeros."""
  c, taps = config, (batch_size, config.conv_width - 1)
  return Mamba2Cache(
    state=jnp.zeros(
      (batch_size, c.num_heads, c.state_dim, c.head_dim), jnp.float32
    ),
    conv_x=jnp.zeros((*taps, c.inner_dim), dtype),
    conv_b=jnp.zeros((*taps, c.state_dim), dtype),
    conv_c=jnp.zeros((*taps, c.state_dim), dtype),
  )


class Mamba2Mixer(nn.Module):
  """Mamba-2 layer, x [B, T, D] -> y [B, T, D].

  In the op's symbols q is C, k is B, v is x and w is dt.

  Attributes:
    config: Sizes and initial decays.
    num_layers: Layers of the model; scales the initial output projection.
    dtype: Dtype of activations.
    param_dtype: Dtype of parameters; A_log, dt_bias and D are float32.
  """

  config: Mamba2Config
  num_layers: int
  dtype: str = "float32"
  param_dtype: str = "float32"

  @nn.compact
  def __call__(
    self,
    x: Activations,
    segment_ids: SegmentIds | None = None,
    cache: Mamba2Cache | CacheLayer | None = None,
  ) -> tuple[Activations, Mamba2Cache | CacheLayer | None]:
    c = self.config
    inner = ((c.num_heads, c.head_dim), ("heads", "value_dim"))
    shared = ((c.state_dim,), ("key_dim",))
    tails, part = (None,) * 3, None
    if cache is not None:
      part = as_layer(cache)
      tails = tuple(
        map(
          part.of_layer,
          (part.cache.conv_x, part.cache.conv_b, part.cache.conv_c),
        )
      )
    z = input_projection(self, "z_proj", *inner)(x)
    v, conv_x = self._short_conv("x", x, inner, segment_ids, tails[0])
    k, conv_b = self._short_conv("B", x, shared, segment_ids, tails[1])
    q, conv_c = self._short_conv("C", x, shared, segment_ids, tails[2])
    dt, g = self._step_and_decay(x)
    # Decays of the op belong to key heads, so each head gets a copy of B and C.
    q, k, g = (
      jnp.broadcast_to(a, (*dt.shape, c.state_dim))
      for a in (q[:, :, None], k[:, :, None], g[..., None])
    )
    w = jnp.broadcast_to(dt[..., None].astype(v.dtype), v.shape)
    inputs = {"q": q, "k": k, "v": v, "g": g, "b": jnp.zeros_like(k), "w": w}
    for name, value in inputs.items():
      self.sow("intermediates", name, value)
    options = {"scale": 1.0, "implementation": c.implementation or None}
    if cache is not None and segment_ids is None and x.shape[1] == 1:
      token = (a[:, 0] for a in inputs.values())
      o, states = gdn2_step(
        *token, part.cache.state, layer=part.layer, **options
      )
      o, part = o[:, None], part.replace(cache=part.cache.replace(state=states))
    else:
      state = None if part is None else part.of_layer(part.cache.state)
      run = on_shards(gdn2, _OP, [_TOKENS, _OP["state"]])
      o, state = run(**inputs, state=state, segment_ids=segment_ids, **options)
      part = part and part.update(state=state)
    self.sow("intermediates", "o", o)
    y = self._output(x, o, v, z)
    if cache is None:
      return y, None
    return y, like(
      cache, part.update(conv_x=conv_x, conv_b=conv_b, conv_c=conv_c)
    )

  def _short_conv(self, name, x, channels, segment_ids, tail):
    """Computes silu(conv(x W) + bias) and the new tail."""
    shape, axes = channels
    y = input_projection(self, f"{name}_proj", shape, axes)(x)
    y = nn.with_logical_constraint(y, ("batch", "length", *axes))
    W, config = self.config.conv_width, self.config
    kernel = layers.parameter(
      self,
      f"{name}_conv",
      layers.conv_kernel(on_current=config.conv_init == "current"),
      ("taps", *axes),
      (W, *shape),
    )
    bias = layers.parameter(
      self, f"{name}_conv_bias", layers.conv_bias(W), axes, shape
    )
    split = "heads" if axes[0] == "heads" else None
    names = {
      "x": (*_IDS, split),
      "kernel": (None, split),
      "bias": (split,),
      "segment_ids": _IDS,
      "state": ("batch", None, split),
    }
    out = [names["x"], names["state"]]
    flat, tail = on_shards(short_conv, names, out, tokens=W - 1)(
      x=y.reshape(*y.shape[:2], -1),
      kernel=kernel.astype(self.dtype).reshape(W, -1),
      bias=bias.astype(self.dtype).reshape(-1),
      segment_ids=segment_ids,
      state=tail,
      activation="silu",
      implementation="xla",  # the kernels take no bias
    )
    return flat.reshape(y.shape), tail

  def _step_and_decay(self, x):
    """Step size dt and log-decay A dt, both [B, T, H], float32."""
    c = self.config
    a, dt_range = c.decay_ranges
    dt = input_projection(self, "dt_proj", (c.num_heads,), ("heads",))(x)
    a_log = self._per_head("A_log", layers.init_a_log(*a))
    dt_bias = self._per_head("dt_bias", layers.init_dt_bias(*dt_range))
    dt = dt.astype(jnp.promote_types(dt.dtype, jnp.float32))
    dt = jax.nn.softplus(dt + dt_bias[None, None])
    return dt, -jnp.exp(a_log)[None, None] * dt

  def _per_head(self, name, init):
    return layers.parameter(
      self, name, init, ("heads",), (self.config.num_heads,), "float32"
    )

  def _output(self, x, o, v, z):
    """Skip, gate, norm over all heads, then the projection to D channels."""
    c = self.config
    ones = nn.initializers.ones_init()
    skip = self._per_head("D", ones)
    weight = layers.parameter(
      self,
      "o_norm",
      ones,
      ("heads", "value_dim"),
      (c.num_heads, c.head_dim),
    )
    wide = jnp.promote_types(o.dtype, jnp.float32)
    y = o.astype(wide) + skip[None, None, :, None] * v.astype(wide)
    y = y * jax.nn.silu(z.astype(wide))
    y = rms_norm(
      y.reshape(*y.shape[:2], -1), weight.reshape(-1), eps=c.norm_eps
    )
    return output_projection(self, x.shape[-1])(y.reshape(o.shape))


def input_projection(
  mixer: Any, name: str, features: tuple[int, ...], axes: tuple[str, ...]
) -> layers.Linear:
  """Linear map [D] -> features without bias, a part of the input projection."""
  return layers.Linear(
    features,
    ("embed", *axes),
    layers.fan_in_uniform(),
    dtype=mixer.dtype,
    param_dtype=mixer.param_dtype,
    name=name,
  )


def output_projection(mixer: Any, model_dim: int) -> layers.Linear:
  """Linear map [H, head_dim] -> [D], small in deep models.

  Initially U(-a, a) with a = 1 / sqrt(2 num_layers inner_dim), as the reference
  model has it for layers with an MLP.
  """
  return layers.Linear(
    (model_dim,),
    ("heads", "value_dim", "embed"),
    layers.fan_in_uniform((2.0 * mixer.num_layers) ** -0.5, 2),
    dtype=mixer.dtype,
    param_dtype=mixer.param_dtype,
    name="o_proj",
  )
