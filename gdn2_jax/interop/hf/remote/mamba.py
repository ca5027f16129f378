# Copyright 2026 The gdn2_jax Authors. SPDX-License-Identifier: Apache-2.0
"""Layers of Mamba-2 (arXiv 2405.21060) and Mamba-3 (arXiv 2603.15569)."""

import math

import torch
from torch import nn
from torch.nn import functional

from .gdn2 import depthwise, linear
from .recurrence import CHUNK, decays, gdn2, rms_norm, short_conv, wide


def _ones(*shape):
  return nn.Parameter(torch.ones(shape))


class Mamba2Mixer(nn.Module):
  """Mixer of layers M: GDN-2 that erases nothing, with q = C, k = B, v = x."""

  def __init__(self, model_dim, part):
    super().__init__()
    self.part = c = part
    heads = c.inner_dim // c.head_dim
    self.z_proj = linear(model_dim, c.inner_dim)
    self.x_proj = linear(model_dim, c.inner_dim)
    self.B_proj = linear(model_dim, c.state_dim)
    self.C_proj = linear(model_dim, c.state_dim)
    self.x_conv = depthwise(c.inner_dim, c.conv_width, bias=True)
    self.B_conv = depthwise(c.state_dim, c.conv_width, bias=True)
    self.C_conv = depthwise(c.state_dim, c.conv_width, bias=True)
    self.dt_proj = linear(model_dim, heads)
    self.A_log = nn.Parameter(torch.zeros(heads))
    self.dt_bias = nn.Parameter(torch.zeros(heads))
    self.D = _ones(heads)
    self.o_norm = _ones(heads, c.head_dim)
    self.o_proj = linear(c.inner_dim, model_dim)

  def forward(self, x, mask, positions, cache):
    """Mixes tokens; arguments as in GDN2Mixer."""
    c, cache, new = self.part, cache or {}, {}

    def convolved(name):
      y = getattr(self, f"{name}_proj")(x)
      conv = getattr(self, f"{name}_conv")
      y, new[name] = short_conv(y, conv, cache.get(name), mask)
      return y

    v = convolved("x").unflatten(-1, (-1, c.head_dim))
    k, q = convolved("B"), convolved("C")
    dt = functional.softplus(wide(self.dt_proj(x)) + self.dt_bias)
    g = -wide(self.A_log).exp() * dt
    shape = (*dt.shape, c.state_dim)
    q, k = (y[:, :, None].expand(shape) for y in (q, k))
    b, w = torch.zeros_like(wide(k)), dt[..., None].expand(v.shape)
    o, new["state"] = gdn2(
      *(q, k, v, g[..., None].expand(shape), b, w),
      state=cache.get("state"),
      scale=1.0,
    )
    y = (wide(o) + self.D[:, None] * wide(v)).flatten(2)
    y = y * functional.silu(wide(self.z_proj(x)))
    y = rms_norm(y, self.o_norm.flatten(), c.norm_eps)
    return self.o_proj(y.to(x.dtype)), new


class Mamba3Mixer(nn.Module):
  """Mixer of layers N, with R = mimo_rank inputs and outputs per head."""

  def __init__(self, model_dim, part):
    super().__init__()
    self.part = c = part
    heads, R = c.inner_dim // c.head_dim, c.mimo_rank
    self.angles = int(c.state_dim * c.rope_fraction) // 2
    self.z_proj = linear(model_dim, c.inner_dim)
    self.x_proj = linear(model_dim, c.inner_dim)
    for name in ("B", "C"):
      self.add_module(f"{name}_proj", linear(model_dim, R * c.state_dim))
      self.register_parameter(f"{name}_norm", _ones(c.state_dim))
      self.register_parameter(f"{name}_bias", _ones(heads, R, c.state_dim))
    for name in ("dt", "A", "lam"):
      self.add_module(f"{name}_proj", linear(model_dim, heads))
    self.dt_bias = nn.Parameter(torch.zeros(heads))
    self.angle_proj = linear(model_dim, self.angles)
    self.D = _ones(heads)
    if R > 1:
      for name in ("mimo_x", "mimo_z", "mimo_o"):
        self.register_parameter(name, _ones(heads, R, c.head_dim))
    if c.out_norm:
      self.o_norm = _ones(heads, c.head_dim)
    self.o_proj = linear(c.inner_dim, model_dim)

  def forward(self, x, mask, positions, cache):
    """Mixes tokens; arguments as in GDN2Mixer."""
    c, cache = self.part, cache or {}
    z, v = (
      y(x).unflatten(-1, (-1, c.head_dim)) for y in (self.z_proj, self.x_proj)
    )
    if mask is not None:
      v = v * mask[..., None]
    dt = functional.softplus(wide(self.dt_proj(x)) + self.dt_bias)
    g = -self._rate(wide(self.A_proj(x))).clamp(min=1e-4) * dt
    lam = torch.sigmoid(wide(self.lam_proj(x)))
    if mask is not None:
      # Positive at padding, too, it would turn the tokens after it.
      dt = dt * wide(mask)
    angle = self._angle(x, dt, cache.get("angle"))
    k, q = (_turn(self._keys(n, x), angle) for n in ("B", "C"))
    v_ranks = self._of_ranks(v, "mimo_x")
    k_first, v_first = cache.get("k"), cache.get("v")
    if k_first is None:
      k_first, v_first = torch.zeros_like(k[:, :1]), v_ranks[:, :1] * 0
    # What tokens t - 1 and t write at token t, 2 R products each.
    before = (dt * g.exp() * (1 - lam))[:, :, None, :, None]
    now = (dt * lam)[:, :, None, :, None]
    keys = torch.cat([torch.cat([k_first, k[:, :-1]], dim=1), k], dim=2)
    older = torch.cat([v_first, v_ranks[:, :-1]], dim=1)
    values = torch.cat([before * older, now * v_ranks], dim=2)
    o, state = _ranked(q, keys, values, g, cache.get("state"))
    new = {"state": state, "angle": angle[:, -1]}
    new |= {"k": k[:, -1:], "v": v_ranks[:, -1:]}
    return self._output(x, o, v_ranks, z), new

  def _rate(self, a):
    """-A before its lower bound."""
    if self.part.a_rule == "softplus":
      return functional.softplus(a)
    return a.clamp(min=0) + 1.0 / (1.0 - a.clamp(max=0))

  def _angle(self, x, dt, first):
    """Accumulated angles [B, T, H, angles] in half turns, in [-1, 1]."""
    step = dt[..., None] * torch.tanh(wide(self.angle_proj(x)))[:, :, None]
    total = step.double().cumsum(1)
    if first is not None:
      total = total + first.double()[:, None]
    return (total - 2.0 * torch.round(0.5 * total.detach())).to(step.dtype)

  def _keys(self, name, x):
    """B or C of every rank and head [B, T, R, H, N]."""
    c = self.part
    y = getattr(self, f"{name}_proj")(x).unflatten(-1, (-1, c.state_dim))
    y = rms_norm(y, getattr(self, f"{name}_norm"), c.norm_eps)
    return y[:, :, :, None] + getattr(self, f"{name}_bias").transpose(0, 1)

  def _of_ranks(self, v, name):
    """v [B, T, H, P] times the factors of every rank [B, T, R, H, P]."""
    v = wide(v)[:, :, None]
    if self.part.mimo_rank == 1:
      return v
    return v * getattr(self, name).transpose(0, 1)

  def _output(self, x, o, v, z):
    """Skip, norm, gate, sum over ranks and the output projection."""
    c = self.part
    y = o + self.D[:, None] * v
    if c.out_norm:
      y = rms_norm(y, self.o_norm, c.norm_eps)
    y = y * functional.silu(self._of_ranks(z, "mimo_z"))
    if c.mimo_rank > 1:
      y = y * self.mimo_o.transpose(0, 1)
    return self.o_proj(y.sum(2).flatten(2).to(x.dtype))


def _turn(x, angle):
  """Rotates channels i and i + N/2 of x [B, T, R, H, N] by half turns."""
  S, half = angle.shape[-1], x.shape[-1] // 2
  angle = math.pi * angle[:, :, None]
  cos, sin = angle.cos(), angle.sin()
  x1, x2 = x[..., :S], x[..., half : half + S]
  parts = [x1 * cos - x2 * sin, x[..., S:half]]
  parts += [x1 * sin + x2 * cos, x[..., half + S :]]
  return torch.cat(parts, dim=-1)


def _ranked(q, k, v, g, state):
  """S_t = exp(g_t) S_{t-1} + sum_s k_{t,s} v_{t,s}^T, o_{t,r} = S_t^T q_{t,r}.

  Args:
    q: [B, T, R, H, N].
    k: [B, T, 2R, H, N].
    v: [B, T, 2R, H, P].
    g: Log-decay [B, T, H].
    state: S before the first token [B, H, N, P]; None means zeros.
  """
  if state is None:
    B, _, _, H, P = v.shape
    state = v.new_zeros(B, H, k.shape[-1], P)
  outputs = []
  for i in range(0, q.shape[1], CHUNK):
    qc, kc, vc, gc = (x[:, i : i + CHUNK] for x in (q, k, v, g))
    between, before = decays(gc.transpose(1, 2)[..., None])  # [B, H, C, ...]
    between, before = between[..., 0], before[..., 0]
    scores = torch.einsum("btrhn,bjshn,bhtj->bhtrjs", qc, kc, between)
    o = torch.einsum("bhtrjs,bjshp->btrhp", scores, vc)
    o = o + torch.einsum("btrhn,bhnp,bht->btrhp", qc, state, before)
    outputs.append(o)
    state = before[:, :, -1, None, None] * state + torch.einsum(
      "bjshn,bjshp,bhj->bhnp", kc, vc, between[:, :, -1]
    )
  return torch.cat(outputs, dim=1), state
