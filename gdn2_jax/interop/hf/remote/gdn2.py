# Copyright 2026 The gdn2_jax Authors. SPDX-License-Identifier: Apache-2.0
"""Layer of Gated DeltaNet-2, its relatives and its ablations.

q, k, v = silu(conv(x W))            q, k then l2-normalised per head
b = sigmoid(x W_b), w = sigmoid(x W_w)
g = -exp(A_log) softplus(x W_f1 W_f2 + dt_bias)
y = (rms_norm(gdn2(q, k, v, g, b, w)) * act(x W_g1 W_g2 + bias)) W_o
"""

import torch
from torch import nn
from torch.nn import functional

from .recurrence import gdn2, l2_norm, rms_norm, short_conv, wide


def linear(inputs, outputs, bias=False):
  """Linear map, by default without a bias."""
  return nn.Linear(inputs, outputs, bias=bias)


def depthwise(channels, taps, bias=False):
  """Depthwise convolution; `short_conv` computes it."""
  return nn.Conv1d(channels, channels, taps, groups=channels, bias=bias)


class GDN2Mixer(nn.Module):
  """Mixer of layers G, K, D and E, x [B, T, D] -> y [B, T, D]."""

  def __init__(self, model_dim, part):
    super().__init__()
    self.part = c = part
    self.value_heads = c.num_value_heads or c.num_heads
    keys, values = c.num_heads * c.key_dim, self.value_heads * c.value_dim
    self.q_proj = linear(model_dim, keys)
    self.k_proj = linear(model_dim, keys)
    self.v_proj = linear(model_dim, values)
    self.q_conv = depthwise(keys, c.conv_width)
    self.k_conv = depthwise(keys, c.conv_width)
    self.v_conv = depthwise(values, c.conv_width)
    if c.gates == "tied":
      self.beta_proj = linear(model_dim, c.num_heads)
    else:
      sizes = {"channel": keys, "scalar": keys, "head": c.num_heads}
      if c.erase_gate != "off":
        self.b_proj = linear(model_dim, sizes[c.erase_gate])
      sizes |= {"channel": values, "scalar": values, "head": self.value_heads}
      self.w_proj = linear(model_dim, sizes[c.write_gate])
    if c.decay != "none":
      shape = (c.num_heads,)
      if c.decay == "scalar":
        self.a_proj = linear(model_dim, c.num_heads)
      else:
        shape = (c.num_heads, c.key_dim)
        self.f_down = linear(model_dim, c.value_dim)
        self.f_up = linear(c.value_dim, keys)
      self.A_log = nn.Parameter(torch.zeros(c.num_heads))
      self.dt_bias = nn.Parameter(torch.zeros(shape))
    self.g_down = linear(model_dim, c.value_dim)
    self.g_up = linear(c.value_dim, values, bias=True)
    self.o_norm = nn.Parameter(torch.ones(c.value_dim))
    self.o_proj = linear(values, model_dim)

  def forward(self, x, mask, positions, cache):
    """Mixes tokens.

    Args:
      x: Activations [B, T, D].
      mask: [B, T, 1], 0 at padding, which is left of the tokens; or None.
      positions: Not used.
      cache: Tensors of an earlier call by name, or None.

    Returns:
      y [B, T, D] and the tensors for the next call.
    """
    c, cache, new = self.part, cache or {}, {}

    def of_heads(name, channels):
      y = getattr(self, f"{name}_proj")(x)
      conv = getattr(self, f"{name}_conv")
      y, new[name] = short_conv(y, conv, cache.get(name), mask)
      return y.unflatten(-1, (-1, channels))

    q, k = of_heads("q", c.key_dim), of_heads("k", c.key_dim)
    v = of_heads("v", c.value_dim)
    b, w = self._erase_and_write(x, k, v)
    g = self._log_decay(x, k)
    inputs = (l2_norm(q), l2_norm(k), v, g, b, w)
    o, new["state"] = gdn2(*inputs, state=cache.get("state"))
    gate = wide(self.g_up(self.g_down(x))).unflatten(-1, (-1, c.value_dim))
    act = functional.silu if c.output_gate == "silu" else torch.sigmoid
    y = rms_norm(o, self.o_norm, c.norm_eps) * act(gate)
    return self.o_proj(y.flatten(2).to(x.dtype)), new

  def _erase_and_write(self, x, k, v):
    """Gates b [B, T, H, K] and w [B, T, HV, V], float32."""
    c = self.part
    scale = 2.0 if c.negative_eigenvalues else 1.0
    if c.gates == "tied":
      beta = scale * torch.sigmoid(wide(self.beta_proj(x)))
      repeats = self.value_heads // c.num_heads
      b, w = beta, beta.repeat_interleave(repeats, dim=2)
      return b[..., None].expand(k.shape), w[..., None].expand(v.shape)

    def gate(kind, project, shape):
      y = torch.sigmoid(wide(project(x)))
      y = y.unflatten(-1, (shape[2], -1))
      if kind == "scalar":
        y = y.mean(-1, keepdim=True)
      return y.expand(shape)

    if c.erase_gate == "off":
      b = torch.zeros_like(wide(k))
    else:
      b = scale * gate(c.erase_gate, self.b_proj, k.shape)
    return b, gate(c.write_gate, self.w_proj, v.shape)

  def _log_decay(self, x, k):
    """g [B, T, H, K], <= 0, float32."""
    c = self.part
    if c.decay == "none":
      return torch.zeros_like(wide(k))
    if c.decay == "scalar":
      f, bias = self.a_proj(x)[..., None], self.dt_bias[:, None]
    else:
      f = self.f_up(self.f_down(x)).unflatten(-1, (-1, c.key_dim))
      bias = self.dt_bias
    g = -wide(self.A_log).exp()[:, None] * functional.softplus(wide(f) + bias)
    return g.expand(k.shape)
