# Copyright 2026 The gdn2_jax Authors. SPDX-License-Identifier: Apache-2.0
"""Gated DeltaNet-2 over a sequence, short convolutions and norms in torch."""

import torch
from torch.nn import functional

CHUNK = 16  # tokens that are computed at once


def wide(x):
  """x in float32, or float64 if it is."""
  return x if x.dtype == torch.float64 else x.float()


def rms_norm(x, weight, eps):
  """x / sqrt(mean x^2 + eps) * weight over the last axis, in float32."""
  y = wide(x)
  y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
  return y * weight.to(y.dtype)


def l2_norm(x):
  """x / sqrt(sum x^2 + 1e-6) over the last axis."""
  y = wide(x)
  return y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6)


def short_conv(x, conv, tail, mask):
  """Causal depthwise convolution over time, then a SiLU.

  Args:
    x: Inputs [B, T, C].
    conv: torch.nn.Conv1d of C groups without padding.
    tail: Inputs before the call [B, W-1, C]; None means zeros.
    mask: [B, T, 1], 0 at padding, whose output is 0; None for no padding.

  Returns:
    y [B, T, C], and the last W-1 inputs.
  """
  if mask is not None:
    x = x * mask
  taps = conv.kernel_size[0]
  if tail is None:
    tail = x.new_zeros(x.shape[0], taps - 1, x.shape[2])
  past = torch.cat([tail, x], dim=1)
  bias = None if conv.bias is None else wide(conv.bias)
  y = functional.conv1d(
    wide(past).transpose(1, 2), wide(conv.weight), bias, groups=x.shape[2]
  )
  y = functional.silu(y).transpose(1, 2).to(x.dtype)
  if mask is not None:
    y = y * mask
  return y, past[:, past.shape[1] - taps + 1 :].clone()


def gdn2(q, k, v, g, b, w, state=None, scale=None):
  """Gated DeltaNet-2 (arXiv 2605.22791, Eq. 10), chunk by chunk.

    S_t = (I - k_t (b_t*k_t)^T) Diag(exp(g_t)) S_{t-1} + k_t (w_t*v_t)^T
    o_t = scale * S_t^T q_t

  With u_t = w_t*v_t - (b_t*k_t)^T Diag(exp(g_t)) S_{t-1}, which a unit lower
  triangular system gives for a chunk, S_t = Diag(exp(g_t)) S_{t-1} + k_t u_t^T.
  Every exponent is a sum of log-decays, so it is never positive.

  Args:
    q: Queries [B, T, H, K].
    k: Keys [B, T, H, K].
    v: Values [B, T, HV, V], HV a multiple of H.
    g: Log-decay [B, T, H, K], <= 0.
    b: Erase gate [B, T, H, K].
    w: Write gate [B, T, HV, V].
    state: S before the first token [B, HV, K, V]; None means zeros.
    scale: Factor on the output; None means K**-0.5.

  Returns:
    o [B, T, HV, V] and the state after the last token, float32 (or float64).
  """
  T, K = q.shape[1], q.shape[3]
  scale = K**-0.5 if scale is None else scale
  repeats = v.shape[2] // k.shape[2]
  kernel = _fla_kernel(v)
  if repeats > 1:
    q, k, g, b = (x.repeat_interleave(repeats, dim=2) for x in (q, k, g, b))
  if kernel is not None:
    q, k, b, w = (x.to(v.dtype) for x in (q, k, b, w))
    return kernel(
      *(q, k, v, wide(g), b, w),
      scale=scale,
      initial_state=state,
      output_final_state=True,
    )
  q, k, v, g, b, w = (wide(x).transpose(1, 2) for x in (q, k, v, g, b, w))
  if state is None:
    state = v.new_zeros(v.shape[0], v.shape[1], K, v.shape[3])
  outputs = []
  for start in range(0, T, CHUNK):
    chunk = (x[:, :, start : start + CHUNK] for x in (q * scale, k, v, g, b, w))
    o, state = _chunk(*chunk, state)
    outputs.append(o)
  return torch.cat(outputs, dim=2).transpose(1, 2), state


def decays(g):
  """exp(sum of g over j < i <= t), lower triangular in (t, j).

  Args:
    g: Log-decays [..., C, K] of C tokens.

  Returns:
    Decays from after token j to token t [..., C, C, K], 0 for j > t; and from
    before the chunk to token t, [..., C, K].
  """
  C = g.shape[-2]
  ones = torch.ones(C, C, dtype=torch.bool, device=g.device)
  # Summed for each j on its own: differences of sums would cancel.
  terms = g.unsqueeze(-2) * ones.tril(-1)[..., None]
  between = terms.cumsum(-3).exp() * ones.tril()[..., None]
  return between, g.cumsum(-2).exp()


def _chunk(q, k, v, g, b, w, state):
  """One chunk; arrays are [B, H, C, channels], state [B, H, K, V]."""
  between, before = decays(g)
  erase = b * k
  products = torch.einsum("bhtk,bhjk,bhtjk->bhtj", erase, k, between)
  products = products.tril(-1) + torch.eye(
    k.shape[2], dtype=k.dtype, device=k.device
  )
  u = torch.linalg.solve_triangular(
    products,
    w * v - (erase * before) @ state,
    upper=False,
    unitriangular=True,
  )
  scores = torch.einsum("bhtk,bhjk,bhtjk->bhtj", q, k, between)
  o = (q * before) @ state + scores @ u
  left = (k * between[:, :, -1]).transpose(2, 3)
  return o, before[:, :, -1, :, None] * state + left @ u


def _fla_kernel(v):
  """fla's kernel for half precision on CUDA where it is installed, or None.

  Never run by the authors of this file, who had no such GPU: compare with the
  plain path before use.
  """
  if not v.is_cuda or v.dtype not in (torch.bfloat16, torch.float16):
    return None
  try:
    from fla.ops.gdn2 import chunk_gdn2
  except ImportError:
    return None
  return chunk_gdn2
