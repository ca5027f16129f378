"""The Mamba-3 mixer (arXiv 2603.15569), SISO and MIMO.

z, x, B, C, dt, A, lam, angle = u W_z, u W_x, ..., u W_angle
dt = softplus(dt + dt_bias), A = -softplus(A), lam = sigmoid(lam)    per head
phi_t = phi_{t-1} + dt_t pi tanh(angle_t)                            per head
B = rotate(rms_norm(B) + B_bias, phi), C likewise
h_t by the trapezoidal rule (Eq. 16, gdn2_jax.ops.gdn2.variants)
out = (y * silu(z)) W_o,   y = h^T C + D x

There is no convolution. With mimo_rank R > 1 a token has R vectors B and C, and
x, z and y are scaled for every rank r:

x_r = mimo_x_r * x,  out = (sum_r mimo_o_r * y_r * silu(mimo_z_r * z)) W_o

As in mamba2.py every part of the input projection has its own matrix.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import lax

from gdn2_jax.config_class import check_choices, config_class
from gdn2_jax.model import layers
from gdn2_jax.model.mixers.gdn2_config import check_implementation
from gdn2_jax.model.mixers.mamba2 import (
  check_sizes,
  input_projection,
  output_projection,
)
from gdn2_jax.ops.gdn2.variants import mamba3_mimo
from gdn2_jax.ops.norm import rms_norm
from gdn2_jax.ops.segments import last_token, segment_starts
from gdn2_jax.typing import Activations, SegmentIds

# Initial ranges of dt. A depends on the token and starts near -softplus(0).
_DECAY_INIT = {"paper": (1e-3, 1e-1), "long": (1e-3, 1e-2)}
_MIN_A = 1e-4


@config_class
class Mamba3Config:
  """Config of a Mamba-3 layer.

  Attributes:
    inner_dim: Channels of x and z, all heads together, a multiple of head_dim.
    head_dim: Channels of x in a head, 16 to 256.
    state_dim: Channels of B and C, 16 to 256, even.
    mimo_rank: Inputs and outputs R of a head per token; 1 is SISO, which has no
      parameters mimo_x, mimo_z and mimo_o.
    rope_fraction: Share of the channels of B and C that are rotated, 0.5 or 1.
    a_rule: -A as a function of its projection: "softplus" (the paper, and fla),
      or "heavy_tail", 1 + a for a >= 0 and 1 / (1 - a) below, to which the
      reference layer changed later. Both are at least 1e-4.
    decay_init: Initial range of dt: "paper", [1e-3, 1e-1], a median half-life
      of about 100 tokens; or "long", [1e-3, 1e-2], about 300.
    out_norm: Norm of every head's output before the gate; off in the paper.
    norm_eps: Added to the mean square in the norms.
    implementation: Implementation of the op, as in GDN2Config.
  """

  inner_dim: int = 4096
  head_dim: int = 64
  state_dim: int = 64
  mimo_rank: int = 1
  rope_fraction: float = 0.5
  a_rule: Literal["softplus", "heavy_tail"] = "softplus"
  decay_init: Literal["paper", "long"] = "paper"
  out_norm: bool = False
  norm_eps: float = 1e-5
  implementation: str = ""

  @property
  def num_heads(self) -> int:
    """Number of heads H."""
    return self.inner_dim // self.head_dim

  @property
  def num_angles(self) -> int:
    """Rotated pairs of channels of B and C."""
    return int(self.state_dim * self.rope_fraction) // 2

  def validate(self, path: str) -> None:
    """Raises ValueError naming the first field under `path` that is wrong."""
    check_sizes(self, path)
    if self.state_dim % 2:
      raise ValueError(
        f"{path}.state_dim={self.state_dim}: expected an even number"
      )
    if self.mimo_rank < 1:
      raise ValueError(f"{path}.mimo_rank={self.mimo_rank}: expected >= 1")
    if self.rope_fraction not in (0.5, 1.0):
      raise ValueError(
        f"{path}.rope_fraction={self.rope_fraction}: expected 0.5 or 1"
      )
    check_choices(self, path)
    check_implementation(self.implementation, path)


@struct.dataclass
class Mamba3Cache:
  """State of a Mamba-3 layer, of a size that does not depend on the tokens.

  Attributes:
    state: h [B, H, state_dim, head_dim], float32.
    angle: Accumulated angles [B, H, angles] in half turns, float32, in [-1, 1].
    b: Rotated B of the last token, [B, R, H, state_dim].
    x: x of the last token [B, H, head_dim], of no rank.
  """

  # Any: tree transformations put objects other than arrays in these fields.
  state: Any
  angle: Any
  b: Any
  x: Any


def init_mamba3_cache(
  config: Mamba3Config, batch_size: int, dtype
) -> Mamba3Cache:
  """Cache before the first token, all zeros."""
  c, H = config, config.num_heads
  return Mamba3Cache(
    state=jnp.zeros((batch_size, H, c.state_dim, c.head_dim), jnp.float32),
    angle=jnp.zeros((batch_size, H, c.num_angles), jnp.float32),
    b=jnp.zeros((batch_size, c.mimo_rank, H, c.state_dim), dtype),
    x=jnp.zeros((batch_size, H, c.head_dim), dtype),
  )


class Mamba3Mixer(nn.Module):
  """Mamba-3 layer, x [B, T, D] -> y [B, T, D].

  In the op's symbols q is C, k is B and v is x.

  Attributes:
    config: Sizes, rank and initial decays.
    num_layers: Layers of the model; scales the initial output projection.
    dtype: Dtype of activations.
    param_dtype: Dtype of matrices and norm weights; all else is float32.
  """

  config: Mamba3Config
  num_layers: int
  dtype: str = "float32"
  param_dtype: str = "float32"

  @nn.compact
  def __call__(
    self,
    x: Activations,
    segment_ids: SegmentIds | None = None,
    cache: Mamba3Cache | None = None,
  ) -> tuple[Activations, Mamba3Cache | None]:
    c = self.config
    inner = ((c.num_heads, c.head_dim), ("heads", "value_dim"))
    z = input_projection(self, "z_proj", *inner)(x)
    v = input_projection(self, "x_proj", *inner)(x)
    dt, g, lam = self._gates(x)
    angle = self._angle(x, dt, segment_ids, cache)
    k = _rotate(self._keys("B", x), angle).astype(v.dtype)
    q = _rotate(self._keys("C", x), angle).astype(v.dtype)
    mimo_x = self._per_rank("mimo_x", 1.0 / c.mimo_rank)

    def of_ranks(v):
      return _times(v, mimo_x).astype(v.dtype)

    state = previous = None
    if cache is not None:
      state = cache.state
      # As a row of one token, so that it is rounded as in a sequence.
      previous = cache.b, of_ranks(cache.x[:, None])[:, 0]
    v_ranks = of_ranks(v)
    o, state = mamba3_mimo(
      q,
      k,
      v_ranks,
      g=g,
      dt=dt,
      lam=lam,
      previous=previous,
      state=state,
      segment_ids=segment_ids,
      implementation=c.implementation or None,
    )
    y = self._output(x, o, v_ranks, z)
    if cache is None:
      return y, None
    return y, Mamba3Cache(
      state=state,
      angle=last_token(angle, cache.angle, segment_ids),
      b=last_token(k, cache.b, segment_ids),
      x=last_token(v, cache.x, segment_ids),
    )

  def _float32(self, name, init, axes, shape):
    return layers.parameter(self, name, init, axes, shape, "float32")

  def _gates(self, x):
    """Step size dt, log-decay A dt and weight lam, [B, T, H], float32."""
    c = self.config
    heads = ((c.num_heads,), ("heads",))
    dt, a, lam = (
      _wide(input_projection(self, f"{name}_proj", *heads)(x))
      for name in ("dt", "A", "lam")
    )
    init = layers.init_dt_bias(*_DECAY_INIT[c.decay_init])
    dt_bias = self._float32("dt_bias", init, ("heads",), (c.num_heads,))
    dt = jax.nn.softplus(dt + dt_bias[None, None])
    if c.a_rule == "softplus":
      a = jax.nn.softplus(a)
    else:
      a = jnp.maximum(a, 0) + 1.0 / (1.0 - jnp.minimum(a, 0))
    return dt, -jnp.maximum(a, _MIN_A) * dt, jax.nn.sigmoid(lam)

  def _angle(self, x, dt, segment_ids, cache):
    """Accumulated angles [B, T, H, angles] in half turns, float32."""
    angle = ((self.config.num_angles,), ("key_dim",))
    speed = _wide(input_projection(self, "angle_proj", *angle)(x))
    step = dt[..., None] * jnp.tanh(speed)[:, :, None]
    restarts = None
    if segment_ids is not None:
      step = jnp.where((segment_ids != 0)[:, :, None, None], step, 0)
      restarts = segment_starts(segment_ids)
    first = None if cache is None else cache.angle
    return accumulate_angles(step, restarts, first)

  def _keys(self, name, x):
    """B or C of every rank and head [B, T, R, H, N], normalised, with bias."""
    c = self.config
    ones = nn.initializers.ones_init()
    y = input_projection(
      self, f"{name}_proj", (c.mimo_rank, c.state_dim), ("mimo_rank", "key_dim")
    )(x)
    weight = layers.parameter(
      self, f"{name}_norm", ones, ("key_dim",), (c.state_dim,)
    )
    y = rms_norm(_wide(y), weight, eps=c.norm_eps)
    bias = self._float32(
      f"{name}_bias",
      ones,
      ("heads", "mimo_rank", "key_dim"),
      (c.num_heads, c.mimo_rank, c.state_dim),
    )
    return y[:, :, :, None] + bias.swapaxes(0, 1)[None, None]

  def _per_rank(self, name, value):
    """Factors [R, H, head_dim], or None for SISO."""
    c = self.config
    if c.mimo_rank == 1:
      return None
    return self._float32(
      name,
      nn.initializers.constant(value),
      ("heads", "mimo_rank", "value_dim"),
      (c.num_heads, c.mimo_rank, c.head_dim),
    ).swapaxes(0, 1)

  def _output(self, x, o, v, z):
    """Skip, norm, gate, sum over ranks and the projection to D channels."""
    c = self.config
    ones = nn.initializers.ones_init()
    skip = self._float32("D", ones, ("heads",), (c.num_heads,))
    y = _wide(o) + skip[None, None, None, :, None] * _wide(v)
    if c.out_norm:
      weight = layers.parameter(
        self,
        "o_norm",
        ones,
        ("heads", "value_dim"),
        (c.num_heads, c.head_dim),
      )
      mean_square = jnp.mean(y * y, axis=-1, keepdims=True)
      y = y * lax.rsqrt(mean_square + c.norm_eps) * weight[None, None, None]
    y = y * jax.nn.silu(_times(z, self._per_rank("mimo_z", 1.0)))
    mimo_o = self._per_rank("mimo_o", 1.0 / c.mimo_rank)
    if mimo_o is not None:
      y = y * mimo_o[None, None]
    y = y.sum(axis=2).astype(self.dtype)
    return output_projection(self, x.shape[-1])(y)


def accumulate_angles(
  step: Any, restarts: Any = None, first: Any = None
) -> Any:
  """Running sums of angles over time, in half turns, in [-1, 1].

  Whole turns, which are the number 2, are taken off after every addition.
  Rounding errors then do not grow with the sum, as they do in radians.

  Args:
    step: Angles [B, T, H, S].
    restarts: [B, T], True where the sum starts at zero, which the first token
      of a row does not; None for nowhere.
    first: Angle before the first token [B, H, S]; None means zero.
  """
  if first is not None:
    step = step.at[:, 0].add(first.astype(step.dtype))
  if restarts is None:
    return lax.associative_scan(_add_angles, step, axis=1)

  def add(a, b):
    (a_restarts, x), (b_restarts, y) = a, b
    total = _add_angles(jnp.where(b_restarts, 0, x), y)
    return a_restarts | b_restarts, total

  flags = restarts[:, :, None, None]
  return lax.associative_scan(add, (flags, step), axis=1)[1]


def _add_angles(a, b):
  """a + b less whole turns; the gradient is that of the sum."""
  total = a + b
  return total - 2.0 * jnp.round(0.5 * total)


def _rotate(x, angle):
  """Rotates channels i and i + N/2 of x [B, T, R, H, N] by angle i.

  Only as many pairs as there are angles [B, T, H, S], in half turns.
  """
  S, half = angle.shape[-1], x.shape[-1] // 2
  angle = math.pi * angle
  cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
  x1, x2 = x[..., :S], x[..., half : half + S]
  return jnp.concatenate(
    [
      x1 * cos - x2 * sin,
      x[..., S:half],
      x1 * sin + x2 * cos,
      x[..., half + S :],
    ],
    axis=-1,
  )


def _times(x, factors):
  """x [B, T, H, P] times the factors of every rank, [B, T, R, H, P], wide."""
  x = _wide(x)[:, :, None]
  return x if factors is None else x * factors[None, None]


def _wide(x):
  """x in float32, or float64 if it is."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))
