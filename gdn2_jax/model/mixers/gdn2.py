"""The Gated DeltaNet-2 mixer (paper section 3.5, appendices C and D).

q, k, v = silu(conv(x W))            q, k then l2-normalised per head
b = sigmoid(x W_b), w = sigmoid(x W_w)
g = -exp(A_log) softplus(x W_f1 W_f2 + dt_bias)        float32
o = gdn2(q, k, v, *gates(g, b, w))      gates: the identity unless overridden
y = (rms_norm(o) * act(x W_g1 W_g2 + bias)) W_o

GDN2Config has settings that make KDA, Gated DeltaNet and DeltaNet of it, and
the ablations of Table 5.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float

from gdn2_jax.model import layers
from gdn2_jax.model.mixers.gdn2_config import GDN2Config
from gdn2_jax.model.mixers.layer_cache import CacheLayer, as_layer, like
from gdn2_jax.model.mixers.token_step import token_in_kernel
from gdn2_jax.model.on_shards import length_axis, on_shards
from gdn2_jax.ops.gdn2.api import gdn2, gdn2_step
from gdn2_jax.ops.gdn2.fused_gates import (
  Projections,
  activate,
  gdn2_fused_gates,
)
from gdn2_jax.ops.gdn2.inputs import check_inputs
from gdn2_jax.ops.layer_step import least_rows
from gdn2_jax.ops.norm import gated_rms_norm
from gdn2_jax.ops.short_conv import short_conv
from gdn2_jax.typing import Activations, SegmentIds

_GAIN = 2.0**-2.5  # Xavier gain of the layer's linear maps

# Logical axis names of the ops' arrays, for on_shards.
_IDS = ("batch", "length")
_TOKENS = (*_IDS, "heads", None)
_CONV = {
  "x": (*_IDS, "heads"),
  "kernel": (None, "heads"),
  "segment_ids": _IDS,
  "state": ("batch", None, "heads"),
}
_OP = {
  **dict.fromkeys("qkvgbw", _TOKENS),
  "state": ("batch", "heads", None, None),
  "segment_ids": _IDS,
}
_NORM = {
  "x": _TOKENS,
  "gate": _TOKENS,
  "weight": (None,),
  "bias": ("heads", None),
}


@struct.dataclass
class GDN2Cache:
  """State of a GDN-2 layer, of a size that does not depend on the tokens read.

  Attributes:
    state: S [B, HV, K, V], float32.
    conv_q, conv_k, conv_v: Last inputs of the short convolutions,
      [B, taps - 1, heads * channels].
  """

  # Any: tree transformations put objects other than arrays in these fields.
  state: Any
  conv_q: Any
  conv_k: Any
  conv_v: Any


def init_gdn2_cache(config: GDN2Config, batch_size: int, dtype) -> GDN2Cache:
  """Cache before the first token, all zeros."""
  c, taps = config, (batch_size, config.conv_width - 1)
  return GDN2Cache(
    state=jnp.zeros(
      (batch_size, c.value_heads, c.key_dim, c.value_dim), jnp.float32
    ),
    conv_q=jnp.zeros((*taps, c.num_heads * c.key_dim), dtype),
    conv_k=jnp.zeros((*taps, c.num_heads * c.key_dim), dtype),
    conv_v=jnp.zeros((*taps, c.value_heads * c.value_dim), dtype),
  )


class GDN2Mixer(nn.Module):
  """Gated DeltaNet-2 layer, x [B, T, D] -> y [B, T, D].

  A subclass that overrides `gates` uses its own gates in training, in decoding
  and in the values that are sown.
  """

  config: GDN2Config
  dtype: str = "float32"
  param_dtype: str = "float32"

  @nn.compact
  def __call__(
    self,
    x: Activations,
    segment_ids: SegmentIds | None = None,
    cache: GDN2Cache | CacheLayer | None = None,
  ) -> tuple[Activations, GDN2Cache | CacheLayer | None]:
    c = self.config
    key_head = (c.num_heads, c.key_dim, "key_dim")
    value_head = (c.value_heads, c.value_dim, "value_dim")
    part = None if cache is None else as_layer(cache)
    maps, taps = zip(
      self._conv_inputs("q", x, key_head),
      self._conv_inputs("k", x, key_head),
      self._conv_inputs("v", x, value_head),
      strict=True,
    )
    b, w = self._erase_and_write(x, key_head, value_head)
    f, a_log, dt_bias = self._decay(x)
    p = Projections(*maps, f, b, w, a_log, dt_bias)
    is_split = length_axis((p.q, _TOKENS), (p.v, _TOKENS)) is not None
    is_token = cache is not None and segment_ids is None and x.shape[1] == 1
    is_fusible = _are_fusible(self)
    is_sown = self.is_mutable_collection("intermediates")
    gate = None
    if is_token and is_fusible and not is_sown:
      gate = self._output_gate(x)
      # The choice is that of ops.layer_step.takes_kernel; a call that it does
      # not take goes on below.
      done = token_in_kernel(p, taps, gate, part, c, self._around_the_op)
      if done is not None:
        o, part = done
        return self._output_map(x, o), like(cache, part)
    from_projections = is_fusible and not (is_token or is_split)
    tails = (None,) * 3
    if part is not None:
      tails = tuple(
        part.of_layer(getattr(part.cache, f"conv_{name}")) for name in "qkv"
      )
    (q, conv_q), (k, conv_k), (v, conv_v) = (
      self._short_conv(y, kernel, segment_ids, tail)
      for y, kernel, tail in zip(maps, taps, tails, strict=True)
    )
    p = p._replace(q=q, k=k, v=v)
    # Called at most once: `gates` may create parameters.
    inputs = None
    if is_sown or not from_projections:
      inputs = _op_inputs(self, p)
    if is_sown:
      for name, value in zip("qkvgbw", inputs, strict=True):
        self.sow("intermediates", name, value)

    options = {"implementation": c.implementation or None}
    if is_token:
      states, layer = part.cache.state, part.layer
      o, states = gdn2_step(
        *(a[:, 0] for a in inputs), states, layer=layer, **options
      )
      o, part = o[:, None], part.replace(cache=part.cache.replace(state=states))
    else:
      state = None if part is None else part.of_layer(part.cache.state)
      options |= {"state": state, "segment_ids": segment_ids}
      if from_projections:
        o, state = gdn2_fused_gates(p, erase_scale=c.erase_scale, **options)
      else:
        run = on_shards(gdn2, _OP, [_TOKENS, _OP["state"]])
        o, state = run(**dict(zip("qkvgbw", inputs, strict=True)), **options)
      part = part and part.update(state=state)
    self.sow("intermediates", "o", o)
    gate = self._output_gate(x) if gate is None else gate
    y = self._output_map(x, self._gated_norm(o, gate))
    if cache is None:
      return y, None
    return y, like(
      cache, part.update(conv_q=conv_q, conv_k=conv_k, conv_v=conv_v)
    )

  def gates(
    self,
    g: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    w: Float[Array, "B T HV V"],
  ) -> tuple[Array, Array, Array]:
    """Gates of the recurrence; override it for gates of your own.

    Called once per call of the layer, with sequences and with single tokens, so
    it must not mix tokens. It may use `self.param` and submodules. Kernels with
    fused gates run only if it is not overridden. docs/layer.md has examples.

    Args:
      g: Log-decay [B, T, H, K], <= 0, float32.
      b: Erase gate [B, T, H, K], as config.gates and config.erase_gate say.
      w: Write gate [B, T, HV, V], as config.gates and config.write_gate say.

    Returns:
      (g, b, w) of the same shapes, with g <= 0.

    Raises:
      ValueError: From the layer, if a returned shape is wrong or, outside jit,
        g has a positive entry.
    """
    return g, b, w

  def _linear(
    self, name, features, axes, in_dims=1, has_bias=False, min_rows=1
  ):
    return layers.Linear(
      features,
      axes,
      layers.xavier_uniform(_GAIN, in_dims),
      has_bias=has_bias,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      min_rows=min_rows,
      name=name,
    )

  @property
  def _around_the_op(self):
    """Implementation of convolution and norm; None prefers kernels."""
    kernels = self.config.implementation in ("", "mosaic_gpu")
    return None if kernels else "xla"

  def _conv_inputs(self, name, x, head):
    """Computes x W [B, T, heads, channels] and the convolution's kernel."""
    *shape, channel_axis = head
    axes = ("heads", channel_axis)
    y = self._linear(f"{name}_proj", tuple(shape), ("embed", *axes))(x)
    y = nn.with_logical_constraint(y, ("batch", "length", *axes))
    W = self.config.conv_width
    kernel = layers.parameter(
      self,
      f"{name}_conv",
      layers.conv_kernel(on_current=self.config.conv_init == "current"),
      ("taps", *axes),
      (W, *shape),
    ).astype(self.dtype)
    return y, kernel

  def _short_conv(self, y, kernel, segment_ids, tail):
    """Computes silu(conv(y)) [B, T, heads, channels], and the new tail."""
    W = self.config.conv_width
    out = [_CONV["x"], _CONV["state"]]
    flat, tail = on_shards(short_conv, _CONV, out, tokens=W - 1)(
      x=y.reshape(*y.shape[:2], -1),
      kernel=kernel.reshape(W, -1),
      segment_ids=segment_ids,
      state=tail,
      activation="silu",
      implementation=self._around_the_op,
    )
    return flat.reshape(y.shape), tail

  def _erase_and_write(self, x, key_head, value_head):
    """Gates b and w before the sigmoid, with all channels or with one."""
    c = self.config
    if c.gates == "tied":
      beta = self._linear("beta_proj", (c.num_heads,), ("embed", "heads"))(x)
      repeats = c.value_heads // c.num_heads
      return beta[..., None], jnp.repeat(beta, repeats, axis=2)[..., None]

    def gate(name, kind, head):
      heads, size, axis = head
      if kind == "off":
        return None
      if kind == "head":
        return self._linear(name, (heads,), ("embed", "heads"))(x)[..., None]
      return self._linear(name, (heads, size), ("embed", "heads", axis))(x)

    b = gate("b_proj", c.erase_gate, key_head)
    return b, gate("w_proj", c.write_gate, value_head)

  def _decay(self, x):
    """Parts f, A_log [H] and dt_bias of the log-decay; None for no decay.

    f is [B, T, H, K] and dt_bias [H, K], or with one channel to a head.
    """
    # A_log and dt_bias are float32 in every model: rounding them to bfloat16
    # would change the decay of slow heads noticeably.
    c = self.config
    if c.decay == "none":
      return None, None, None
    if c.decay == "scalar":
      f = self._linear("a_proj", (c.num_heads,), ("embed", "heads"))(x)
      f, shape, axes = f[..., None], (c.num_heads,), ("heads",)
    else:
      shape, axes = (c.num_heads, c.key_dim), ("heads", "key_dim")
      f = self._linear(
        "f_down",
        (c.value_dim,),
        ("embed", "gate_rank"),
        min_rows=least_rows(x),
      )(x)
      f = self._linear("f_up", shape, ("gate_rank", *axes))(f)
    a, dt = c.decay_ranges
    a_log = layers.parameter(
      self,
      "A_log",
      layers.init_a_log(*a),
      ("heads",),
      (c.num_heads,),
      "float32",
    )
    dt_bias = layers.parameter(
      self, "dt_bias", layers.init_dt_bias(*dt), axes, shape, "float32"
    )
    return f, a_log, dt_bias[:, None] if c.decay == "scalar" else dt_bias

  def _output_gate(self, x):
    """Computes the output gate [B, T, HV, V], its bias, the norm's weight."""
    c = self.config
    gate = self._linear(
      "g_down", (c.value_dim,), ("embed", "gate_rank"), min_rows=least_rows(x)
    )(x)
    gate, bias = self._linear(
      "g_up",
      (c.value_heads, c.value_dim),
      ("gate_rank", "heads", "value_dim"),
      has_bias=True,
    )(gate)
    ones = nn.initializers.ones_init()
    weight = layers.parameter(
      self, "o_norm", ones, ("value_dim",), (c.value_dim,)
    )
    return gate, bias, weight

  def _gated_norm(self, o, gate):
    """Norm per head, times the output gate."""
    c = self.config
    gate, bias, weight = gate
    # Runs per shard: XLA cannot partition a Pallas call.
    return on_shards(gated_rms_norm, _NORM, _TOKENS, exchanges=False)(
      x=o,
      gate=gate,
      weight=weight,
      bias=bias,
      activation=c.output_gate,
      eps=c.norm_eps,
      implementation=self._around_the_op,
    )

  def _output_map(self, x, o):
    """Projects the heads to D channels."""
    return self._linear(
      "o_proj",
      (x.shape[-1],),
      ("heads", "value_dim", "embed"),
      in_dims=2,
      min_rows=least_rows(x),
    )(o)


_STANDARD_GATES = GDN2Mixer.gates


def _are_fusible(mixer):
  """True if the gates are those that kernels compute from projections."""
  if not mixer.config.has_fusible_gates:
    return False
  # Looked up as a call does: subclass, mixin or instance may override it.
  return getattr(mixer.gates, "__func__", None) is _STANDARD_GATES


# Not a method: an override would be ignored where kernels compute the gates.
def _op_inputs(mixer, p):
  """Computes q, k, v, g, b and w of the op, with the mixer's gates."""
  c = mixer.config
  q, k, v, g, b, w = activate(p, erase_scale=c.erase_scale)
  if c.gates == "tied" and c.erase_scale != 1:
    w = c.erase_scale * w
  if c.erase_gate == "scalar":
    b = jnp.broadcast_to(b.mean(-1, keepdims=True), b.shape)
  if c.write_gate == "scalar":
    w = jnp.broadcast_to(w.mean(-1, keepdims=True), w.shape)
  gates = mixer.gates(g, b, w)
  if not isinstance(gates, tuple) or len(gates) != 3:
    got = type(gates).__name__
    if isinstance(gates, tuple):
      got += f" of {len(gates)}"
    raise ValueError(
      f"{type(mixer).__name__}.gates: returned {got}, expected the arrays"
      " (g, b, w)"
    )
  # The op checks, too, but sees only one token or one shard of the arrays.
  return check_inputs(q, k, v, *gates, time_axis=True)
