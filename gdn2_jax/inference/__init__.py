"""Prefill, decode, sampling and sessions with an explicit state.

`docs/inference.md` shows every function at work.
"""

from gdn2_jax.inference.batching import Batcher, Completion
from gdn2_jax.inference.checks import NonFiniteError
from gdn2_jax.inference.files.prefix_cache import StateStore, prefill_cached
from gdn2_jax.inference.files.session import Session, load_session, save_session
from gdn2_jax.inference.files.state import load_state, save_state
from gdn2_jax.inference.generate import Generated, generate, stream
from gdn2_jax.inference.identity import Identity, identify
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
  "Identity",
  "NonFiniteError",
  "RowSamplers",
  "Sampler",
  "Session",
  "State",
  "StateStore",
  "TextStream",
  "batch",
  "decode_step",
  "extend",
  "filter_logits",
  "fork",
  "generate",
  "identify",
  "init_state",
  "load_session",
  "load_state",
  "prefill",
  "prefill_cached",
  "put",
  "row_samplers",
  "sample",
  "save_session",
  "save_state",
  "stream",
  "take",
  "unbatch",
]
