"""Prefill, decode, sampling and sessions with an explicit state.

`docs/inference.md` shows every function at work.
"""

from gdn2_jax.inference.batching import Batcher, Completion
from gdn2_jax.inference.generate import Generated, generate, stream
from gdn2_jax.inference.rows import batch, fork, put, take, unbatch
from gdn2_jax.inference.sampling import (
  GREEDY,
  RowSamplers,
  Sampler,
  filter_logits,
  row_samplers,
  sample,
)
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
  "Batcher",
  "Completion",
  "Generated",
  "RowSamplers",
  "Sampler",
  "State",
  "TextStream",
  "batch",
  "decode_step",
  "extend",
  "filter_logits",
  "fork",
  "generate",
  "init_state",
  "prefill",
  "put",
  "row_samplers",
  "sample",
  "stream",
  "take",
  "unbatch",
]
