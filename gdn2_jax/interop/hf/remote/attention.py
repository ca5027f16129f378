# Copyright 2026 The gdn2_jax Authors. SPDX-License-Identifier: Apache-2.0
"""Causal softmax attention with rotary positions, windowed or full."""

import torch
from torch import nn
from torch.nn import functional

from .gdn2 import linear
from .recurrence import wide


class AttentionMixer(nn.Module):
  """Mixer of layers S (with a window) and A, x [B, T, D] -> y [B, T, D]."""

  def __init__(self, model_dim, part, full):
    super().__init__()
    self.part = c = part
    self.window = None if full else c.window
    self.kv_heads = c.num_kv_heads or c.num_heads
    self.q_proj = linear(model_dim, c.num_heads * c.head_dim)
    self.k_proj = linear(model_dim, self.kv_heads * c.head_dim)
    self.v_proj = linear(model_dim, self.kv_heads * c.head_dim)
    self.o_proj = linear(c.num_heads * c.head_dim, model_dim)

  def forward(self, x, mask, positions, cache):
    """Mixes tokens; `positions` [B, T] are -1 at padding."""
    c = self.part
    q, k, v = (
      project(x).unflatten(-1, (-1, c.head_dim)).transpose(1, 2)
      for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    q, k = (_rotate(y, positions, c.rope_base) for y in (q, k))
    held = positions
    if cache is not None:
      k = torch.cat([cache["k"], k], dim=2)
      v = torch.cat([cache["v"], v], dim=2)
      held = torch.cat([cache["positions"], positions], dim=1)
    now, then = positions[:, :, None], held[:, None]
    # Padding sees padding, as a row of a softmax must not be empty.
    seen = (then <= now) & ((then >= 0) | (now < 0))
    if self.window is not None:
      seen &= then > now - self.window
    repeats = c.num_heads // self.kv_heads
    o = functional.scaled_dot_product_attention(
      q,
      k.repeat_interleave(repeats, dim=1),
      v.repeat_interleave(repeats, dim=1),
      attn_mask=seen[:, None],
    )
    first = 0
    if self.window is not None:
      first = max(0, k.shape[2] - self.window)
    new = {
      "k": k[:, :, first:],
      "v": v[:, :, first:],
      "positions": held[:, first:],
    }
    return self.o_proj(o.transpose(1, 2).flatten(2)), new


def _rotate(x, positions, base):
  """Rotates pairs of channels i and i + D/2 of x [B, H, T, D]."""
  y = wide(x)
  half = x.shape[-1] // 2
  steps = torch.arange(half, dtype=torch.float64, device=x.device)
  frequency = (float(base) ** (-steps / half)).to(y.dtype)
  angle = positions.to(y.dtype)[:, None, :, None] * frequency
  cos, sin = angle.cos(), angle.sin()
  x1, x2 = y[..., :half], y[..., half:]
  turned = torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)
  return turned.to(x.dtype)
