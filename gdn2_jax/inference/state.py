"""The state of a batch of sequences, and the two steps that advance it.

Everything here is a pure function of (parameters, tokens, state). The state
has the same size whatever number of tokens it has seen.
"""

import copy
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from gdn2_jax.inference.checks import (
  require_alive,
  require_batch,
  require_params,
  require_prefill,
)
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.lm import LM, init_cache

CHUNK_SIZE = 512  # tokens that one prefill dispatch takes, per row
_SMALLEST_BUCKET = 16


@struct.dataclass
class State:
  """What a batch of sequences remembers: an immutable pytree.

  Attributes:
    cache: of the model, leaves [groups, B, ...].
    position: [B] int32, tokens seen by each row.
    config: of the model; static, a part of the tree's structure.
  """

  # Any: tree transformations build states of other things than arrays.
  cache: Any
  position: Any
  config: ModelConfig = struct.field(pytree_node=False)


def init_state(
  config: ModelConfig, batch_size: int, max_length: int | None = None
) -> State:
  """Returns the state of `batch_size` sequences that have seen nothing.

  Args:
    config: of the model; copied, so that later changes do not reach the state.
    batch_size: sequences B, >= 1.
    max_length: tokens that a sequence may have in the end. Models whose memory
      is bounded need none and ignore it.

  Raises:
    ValueError: batch_size < 1.
  """
  limit = () if max_length is None else (max_length,)
  return State(
    cache=init_cache(config, batch_size, *limit),
    position=jnp.zeros((batch_size,), jnp.int32),
    config=copy.deepcopy(config),
  )


def prefill(
  params: Any,
  tokens: Int[Array | np.ndarray, "B T"],
  lengths: Int[Array | np.ndarray, " rows"],  # B, checked with the rest
  state: State,
  *,
  chunk_size: int = CHUNK_SIZE,
) -> tuple[Float[Array, "B VOCAB"], State]:
  """Reads right-padded prompts, continuing from `state`, which is donated.

  A row's padding changes nothing of its state, so a ragged batch gives what
  each prompt gives alone. Long prompts are read `chunk_size` tokens at a
  time, and the last chunk is padded to a power of two (from 16), so any mix
  of prompt lengths compiles a handful of programs.

  Args:
    params: unboxed parameters of LM(state.config).
    tokens: [B, T] ids; row i is read up to lengths[i], the rest is ignored.
    lengths: [B] tokens of each row, 1 to T.
    state: of B sequences. Donated: its buffers are reused for the result, so
      go on with the returned state, and copy this one before if you need it.
    chunk_size: tokens per dispatch, >= 1; does not change the result beyond
      rounding.

  Returns:
    float32 logits [B, VOCAB] after each row's last token, and the new state.

  Raises:
    ValueError: shapes that disagree, parameters of another model, a state that
      was donated before, chunk_size < 1, or (if known outside of jit) a length
      outside 1..T or an id outside the vocabulary.
  """
  require_prefill(tokens, lengths, state, chunk_size)
  tokens, lengths = jnp.asarray(tokens), jnp.asarray(lengths)
  batch_size, total = tokens.shape
  logits = jnp.zeros((batch_size, state.config.vocab_size), jnp.float32)
  for start in range(0, total, chunk_size):
    piece = tokens[:, start : start + chunk_size]
    padding = bucket(piece.shape[1], chunk_size) - piece.shape[1]
    piece = jnp.pad(piece, ((0, 0), (0, padding)))
    logits, state = _prefill_chunk(
      params, piece, lengths - start, state, logits
    )
  return logits, state


def bucket(size: int, largest: int) -> int:
  """The smallest power of two >= size and 16, but no more than `largest`."""
  assert 1 <= size <= largest
  return min(largest, max(_SMALLEST_BUCKET, 1 << (size - 1).bit_length()))


@functools.partial(jax.jit, donate_argnames=("state", "logits"))
def _prefill_chunk(params, tokens, lengths, state, logits):
  """One chunk; lengths may be below 1 (row over) or above T (row goes on)."""
  require_params(params, state.config)
  model = LM(state.config)
  size = tokens.shape[1]
  real = jnp.arange(size)[None] < lengths[:, None]
  x, cache = model.apply(
    {"params": params},
    jnp.where(real, tokens, 0),
    real.astype(jnp.int32),
    state.cache,
    method="hidden",
  )
  read = real.sum(axis=1, dtype=jnp.int32)
  # The head is applied to one position per row, not to all of them.
  last = jnp.maximum(read - 1, 0)[:, None, None]
  x_last = jnp.take_along_axis(x, last, axis=1)[:, 0]
  new = model.apply({"params": params}, x_last, method="logits")
  logits = jnp.where(read[:, None] > 0, new.astype(jnp.float32), logits)
  return logits, state.replace(cache=cache, position=state.position + read)


def decode_step(
  params: Any, token: Int[Array | np.ndarray, " rows"], state: State
) -> tuple[Float[Array, "B VOCAB"], State]:
  """Reads one token per row, continuing from `state`, which is donated.

  Args:
    params: unboxed parameters of LM(state.config).
    token: [B] ids in [0, vocab_size); others give NaN.
    state: of B sequences. Donated: its buffers are reused for the result.

  Returns:
    float32 logits [B, VOCAB] of the next token, and the new state.

  Raises:
    ValueError: a batch size or parameters that are not the state's, or a state
      that was donated before.
  """
  require_alive(state)
  return _decode_step(params, token, state)


def advance(
  params: Any, token: Int[Array, " rows"], state: State
) -> tuple[Float[Array, "B VOCAB"], State]:
  """`decode_step` without its jit, for use inside a larger jitted function."""
  require_batch("token", token, state)
  require_params(params, state.config)
  logits, cache = LM(state.config).apply(
    {"params": params}, token[:, None], None, state.cache
  )
  state = state.replace(cache=cache, position=state.position + 1)
  return logits[:, 0].astype(jnp.float32), state


_decode_step = jax.jit(advance, donate_argnames=("state",))
