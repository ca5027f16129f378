"""Softmax attention, windowed or full, over sequences or a cache."""

from gdn2_jax.ops.attention.api import sliding_window_attention

__all__ = [
  "sliding_window_attention",
]
