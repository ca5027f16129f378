"""Jitted prefill, decode and sampling with an explicit state."""

from gdn2_jax.inference.generate import Generated, generate, stream
from gdn2_jax.inference.sampling import GREEDY, Sampler, filter_logits, sample
from gdn2_jax.inference.state import (
  State,
  decode_step,
  extend,
  init_state,
  prefill,
)
from gdn2_jax.inference.text import TextStream

__all__ = [
  "GREEDY",
  "Generated",
  "Sampler",
  "State",
  "TextStream",
  "decode_step",
  "extend",
  "filter_logits",
  "generate",
  "init_state",
  "prefill",
  "sample",
  "stream",
]
