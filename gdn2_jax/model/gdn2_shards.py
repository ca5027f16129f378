"""Convolution, recurrence and norm of GDN-2, on one shard of tokens or on all.

Functions of whole arrays. Where the tokens are split over devices, each device
runs on its own (model/on_shards.py); elsewhere the ops are called as they are.
"""

from gdn2_jax.model.on_shards import length_axis, on_shards
from gdn2_jax.ops.context.api import gdn2_context, short_conv_context
from gdn2_jax.ops.gdn2.api import gdn2
from gdn2_jax.ops.norm import gated_rms_norm
from gdn2_jax.ops.short_conv import short_conv

# Logical names, for shards of tokens.
_IDS = ("batch", "length")
TOKENS = ("batch", "length", "heads", None)
_STATE = ("batch", "heads", None, None)


def convolve(x, kernel, segment_ids, tail, **options):
  """short_conv of [B, T, C]."""
  tokens, tails = ("batch", "length", "heads"), ("batch", None, "heads")
  taps = kernel.shape[0] - 1
  axis = length_axis((x, tokens), tokens=taps)
  if axis is None:
    return short_conv(x, kernel, segment_ids=segment_ids, state=tail, **options)

  def run(x, kernel, segment_ids, tail):
    return short_conv_context(
      x,
      kernel,
      axis_name=axis,
      segment_ids=segment_ids,
      state=tail,
      **options,
    )

  into = (tokens, (None, "heads"), _IDS, tails)
  return on_shards(run, into, [tokens, tails])(x, kernel, segment_ids, tail)


def gated_norm(o, gate, weight, bias, **options):
  """gated_rms_norm; XLA cannot split a call of the kernel."""

  def run(o, gate, weight, bias):
    return gated_rms_norm(o, gate, weight, bias=bias, **options)

  if length_axis((o, TOKENS)) is not None:
    into = (TOKENS, TOKENS, (None,), ("heads", None))
    run = on_shards(run, into, TOKENS)
  return run(o, gate, weight, bias)


def recur(q, k, v, g, b, w, state, segment_ids, **options):
  """gdn2 over a sequence."""
  axis = length_axis((q, TOKENS), (v, TOKENS))
  op = gdn2
  if axis is not None:
    op, options = gdn2_context, options | {"axis_name": axis}

  def run(q, k, v, g, b, w, state, ids):
    return op(q, k, v, g, b, w, state=state, segment_ids=ids, **options)

  if axis is not None:
    into = (*6 * (TOKENS,), _STATE, _IDS)
    run = on_shards(run, into, [TOKENS, _STATE])
  return run(q, k, v, g, b, w, state, segment_ids)
