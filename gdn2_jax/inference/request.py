"""Validates a generation request and reads its prompts."""

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
    state = self.empty()
    tokens, lengths = self._block()
    _, state = read(params, tokens, lengths - 1, state)
    return state, self.rows()

  def empty(self) -> State:
    """The state that the prompts continue."""
    # Again: a request may have waited.
    require_alive(self.state)
    if self.state is not None:
      return self.state
    longest = int(self._lengths().max()) + self.max_new_tokens
    # A power of two: few shapes, few programs.
    max_length = self.max_length or bucket(longest, MAX_POSITION)
    return init_state(self.config, len(self.prompts), max_length)

  def rows(self) -> Rows:
    """Inputs of the first tokens, once the prompts have been read."""
    tokens, lengths = self._block()
    batch_size = len(lengths)
    key = jax.vmap(jax.random.fold_in, (None, 0))
    return Rows(
      token=tokens[np.arange(batch_size), lengths - 1],
      index=self.index,
      limit=self.index + self.max_new_tokens,
      done=np.zeros((batch_size,), bool),
      key=key(self.rng, jnp.arange(batch_size)),
      stops=pad_stops([self.stop_ids] * batch_size),
      sampler=self.sampler,
    )

  def _block(self):
    """The prompts as one padded block [B, T], and their lengths [B]."""
    lengths = self._lengths().astype(np.int32)
    tokens = np.zeros((len(lengths), lengths.max()), np.int32)
    for row, prompt in zip(tokens, self.prompts, strict=True):
      row[: prompt.size] = prompt
    return tokens, lengths


class Reading:
  """Prompt of a request of one sequence, read piece by piece.

  Pieces of CHUNK_SIZE tokens give, bit for bit, the state of `Request.begin`;
  others the same up to rounding. How a prompt is cut depends on it alone.

  Args:
    request: request of one prompt, whose state is donated.
    piece: tokens of a piece, >= 1; the last one has the rest.
  """

  def __init__(self, request: Request, piece: int):
    self._request, self._piece = request, piece
    self._tokens = request.prompts[0][None, :-1]
    self._read = 0
    self._state = request.empty()

  @property
  def left(self) -> int:
    """Tokens that are still to be read."""
    return self._tokens.shape[1] - self._read

  def advance(self, params: Any) -> int:
    """Reads the next piece; returns its tokens, 0 if nothing is left."""
    size = min(self._piece, self.left)
    if size:
      tokens = self._tokens[:, self._read : self._read + size]
      lengths = np.asarray([size], np.int32)
      _, self._state = read(params, tokens, lengths, self._state, self._piece)
      self._read += size
    return size

  def end(self) -> tuple[State, Rows]:
    """State after the whole prompt but its last token, and the row's inputs."""
    assert not self.left
    return self._state, self._request.rows()
