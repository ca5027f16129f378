"""Ops on tokens split over devices: states and halos exchanged."""

from gdn2_jax.ops.context.api import (
  attention_context,
  gdn2_context,
  short_conv_context,
)

__all__ = [
  "attention_context",
  "gdn2_context",
  "short_conv_context",
]
