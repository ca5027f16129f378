"""Validates a generation request and starts it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gdn2_jax.inference.checks import (
  MAX_POSITION,
  require_alive,
  require_count,
  require_ids,
  require_key,
  require_room,
  require_state,
)
from gdn2_jax.inference.decode import Rows, pad_stops
from gdn2_jax.inference.sampling import Sampler
from gdn2_jax.inference.state import State, bucket, init_state, read
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.lm import has_growing_cache


@dataclasses.dataclass
class Request:
  """Arguments of `generate`, checked before anything is computed."""

  config: ModelConfig
  prompts: Any
  max_new_tokens: int
  rng: Array
  sampler: Sampler
  stop_ids: Any
  state: State | None
  index: Any
  max_length: int | None = None

  def __post_init__(self):
    vocab_size = self.config.vocab_size
    require_count("max_new_tokens", self.max_new_tokens)
    require_key("rng", self.rng)
    self.sampler.check(vocab_size)
    self.stop_ids = require_ids("stop_ids", self.stop_ids, vocab_size).tolist()
    self.prompts = [
      require_ids(f"prompts[{i}]", prompt, vocab_size, least=1)
      for i, prompt in enumerate(self.prompts)
    ]
    batch_size = len(self.prompts)
    if not batch_size:
      raise ValueError("prompts: expected at least one prompt, got none")
    position, limit = 0, None
    if self.state is not None:
      require_state(self.state, self.config, batch_size)
      position, limit = self.state.position, self.state.max_length
    elif has_growing_cache(self.config):
      limit = self.max_length
    require_room(position, self._lengths() + int(self.max_new_tokens), limit)
    self.index = self._index()

  def _index(self):
    shape = (len(self.prompts),)
    index = np.asarray(self.index)
    if index.shape not in ((), shape) or index.dtype.kind not in "iu":
      raise ValueError(
        f"index: expected an integer or {shape[0]} of them, got {self.index}"
      )
    most = MAX_POSITION - int(self.max_new_tokens)
    if index.min() < 0 or index.max() > most:
      raise ValueError(f"index: expected 0 to {most}, got {self.index}")
    return np.broadcast_to(index, shape).astype(np.int32)

  def _lengths(self):
    return np.asarray([prompt.size for prompt in self.prompts], np.int64)

  def begin(self, params) -> tuple[State, Rows]:
    """Reads the prompts but for their last tokens."""
    # Again: a request may have waited.
    require_alive(self.state)
    lengths = self._lengths()
    batch_size = len(lengths)
    state = self.state
    if state is None:
      longest = int(lengths.max()) + self.max_new_tokens
      # A power of two: few shapes, few programs.
      max_length = self.max_length or bucket(longest, MAX_POSITION)
      state = init_state(self.config, batch_size, max_length)
    tokens = np.zeros((batch_size, lengths.max()), np.int32)
    for row, prompt in zip(tokens, self.prompts, strict=True):
      row[: prompt.size] = prompt
    _, state = read(params, tokens, lengths.astype(np.int32) - 1, state)
    key = jax.vmap(jax.random.fold_in, (None, 0))
    return state, Rows(
      token=tokens[np.arange(batch_size), lengths - 1],
      index=self.index,
      limit=self.index + self.max_new_tokens,
      done=np.zeros((batch_size,), bool),
      key=key(self.rng, jnp.arange(batch_size)),
      stops=pad_stops([self.stop_ids] * batch_size),
      sampler=self.sampler,
    )
