"""The state of a batch of sequences, and the two steps that advance it.

Everything here is a pure function of (parameters, tokens, state). The state
has the same size whatever number of tokens it has seen.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.lm import LM, init_cache

CHUNK_SIZE = 512  # tokens that one prefill dispatch takes, per row
_SMALLEST_BUCKET = 16


@struct.dataclass
class State:
  """What a batch of sequences remembers.

  Attributes:
    cache: of the model, leaves [groups, B, ...].
    position: [B] int32, tokens seen by each row.
  """

  cache: Any
  position: Any


def init_state(config: ModelConfig, batch_size: int) -> State:
  """Returns the state of `batch_size` sequences that have seen nothing.

  Raises:
    ValueError: batch_size < 1.
  """
  return State(
    cache=init_cache(config, batch_size),
    position=jnp.zeros((batch_size,), jnp.int32),
  )


def prefill(
  params: Any,
  tokens: Int[Array | np.ndarray, "B T"],
  lengths: Int[Array | np.ndarray, " rows"],  # B, checked with the rest
  state: State,
  *,
  config: ModelConfig,
  chunk_size: int = CHUNK_SIZE,
) -> tuple[Float[Array, "B VOCAB"], State]:
  """Reads right-padded prompts, continuing from `state`.

  A row's padding changes nothing of its state, so a ragged batch gives what
  each prompt gives alone. Long prompts are read `chunk_size` tokens at a
  time, and the last chunk is padded to a power of two (from 16), so any mix
  of prompt lengths compiles a handful of programs. `state` stays usable.

  Args:
    params: unboxed parameters of LM(config).
    tokens: [B, T] ids; row i is read up to lengths[i], the rest is ignored.
    lengths: [B] tokens of each row, 1 to T.
    state: of B sequences.
    config: of the model.
    chunk_size: tokens per dispatch, >= 1; does not change the result beyond
      rounding.

  Returns:
    float32 logits [B, VOCAB] after each row's last token, and the new state.

  Raises:
    ValueError: shapes that disagree, chunk_size < 1, or (if known outside of
      jit) a length outside 1..T or an id outside the vocabulary.
  """
  _check_prefill(tokens, lengths, state, config, chunk_size)
  tokens, lengths = jnp.asarray(tokens), jnp.asarray(lengths)
  batch_size, total = tokens.shape
  logits = jnp.zeros((batch_size, config.vocab_size), jnp.float32)
  for start in range(0, total, chunk_size):
    piece = tokens[:, start : start + chunk_size]
    padding = bucket(piece.shape[1], chunk_size) - piece.shape[1]
    piece = jnp.pad(piece, ((0, 0), (0, padding)))
    logits, state = _prefill_chunk(
      params, piece, lengths - start, state, logits, config=config
    )
  return logits, state


def bucket(size: int, largest: int) -> int:
  """The smallest power of two >= size and 16, but no more than `largest`."""
  assert 1 <= size <= largest
  return min(largest, max(_SMALLEST_BUCKET, 1 << (size - 1).bit_length()))


@functools.partial(jax.jit, static_argnames=("config",))
def _prefill_chunk(params, tokens, lengths, state, logits, *, config):
  """One chunk; lengths may be below 1 (row over) or above T (row goes on)."""
  model = LM(config)
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
  return logits, State(cache=cache, position=state.position + read)


def advance(
  params: Any,
  token: Int[Array, " B"],
  state: State,
  *,
  config: ModelConfig,
) -> tuple[Float[Array, "B VOCAB"], State]:
  """`decode_step` without its jit, for use inside a larger jitted function."""
  logits, cache = LM(config).apply(
    {"params": params}, token[:, None], None, state.cache
  )
  state = State(cache=cache, position=state.position + 1)
  return logits[:, 0].astype(jnp.float32), state


@functools.partial(
  jax.jit, static_argnames=("config",), donate_argnames=("state",)
)
def decode_step(
  params: Any,
  token: Int[Array, " B"],
  state: State,
  *,
  config: ModelConfig,
) -> tuple[Float[Array, "B VOCAB"], State]:
  """Reads one token per row. `state` is donated: use the returned one.

  Args:
    params: unboxed parameters of LM(config).
    token: [B] ids in [0, vocab_size); others give NaN.
    state: of B sequences; its buffers are reused for the result.
    config: of the model.

  Returns:
    float32 logits [B, VOCAB] of the next token, and the new state.
  """
  return advance(params, token, state, config=config)


def _check_prefill(tokens, lengths, state, config, chunk_size) -> None:
  batch_size = state.position.shape[0]
  if tokens.shape[0] != batch_size or tokens.shape[1] < 1:
    raise ValueError(
      f"tokens: expected shape [B={batch_size}, T >= 1] for this state, got "
      f"{tokens.shape}"
    )
  if lengths.shape != (batch_size,):
    raise ValueError(
      f"lengths: expected shape ({batch_size},), got {lengths.shape}"
    )
  if chunk_size < 1:
    raise ValueError(f"chunk_size: expected >= 1, got {chunk_size}")
  if isinstance(tokens, jax.core.Tracer) or isinstance(
    lengths, jax.core.Tracer
  ):
    return
  tokens, lengths = jax.device_get((tokens, lengths))
  if lengths.min() < 1 or lengths.max() > tokens.shape[1]:
    raise ValueError(
      f"lengths: expected 1 to T={tokens.shape[1]}, got {lengths.tolist()}"
    )
  real = np.arange(tokens.shape[1])[None] < lengths[:, None]
  outside = real & ((tokens < 0) | (tokens >= config.vocab_size))
  if outside.any():
    raise ValueError(
      f"tokens: expected ids in [0, {config.vocab_size}), got "
      f"{int(tokens[outside][0])}"
    )
