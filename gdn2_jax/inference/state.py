"""State of a batch of sequences, and the functions that advance it.

All are pure functions of (parameters, tokens, state). The size of a state does
not depend on the tokens it has read; models with full attention allocate for a
maximum length in advance.
"""

import copy
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, Shaped

from gdn2_jax.inference.checks import (
  NonFiniteError,
  find_causes,
  is_concrete,
  is_usable,
  require_block,
  require_count,
  require_params,
  require_step,
)
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.lm import LM, init_cache
from gdn2_jax.model.mixers.kv_cache import KVCache

CHUNK_SIZE = 512  # tokens that one prefill dispatch takes, per row
_SMALLEST_BUCKET = 16


@struct.dataclass
class State:
  """Memory of B sequences, an immutable pytree.

  Attributes:
    cache: caches of the model's layers, leaves [groups, B, ...].
    position: [B] int32, tokens read by each row.
    config: model config; static, a part of the tree's structure.
  """

  # Any: tree transformations build states of other things than arrays.
  cache: Any
  position: Any
  config: ModelConfig = struct.field(pytree_node=False)

  @property
  def batch_size(self) -> Any:
    """Sequences B: an int, or a symbol in exported programs."""
    return self.position.shape[0]

  @property
  def max_length(self) -> int | None:
    """Tokens that a sequence may have; None: no limit."""
    for part in self.cache:
      if isinstance(part, KVCache):
        return part.k.shape[-2]
    return None


def init_state(
  config: ModelConfig, batch_size: int, max_length: int | None = None
) -> State:
  """Makes the state of sequences that have read no tokens.

  Args:
    config: model config; copied, so that later changes do not reach the state.
    batch_size: sequences B, >= 1.
    max_length: tokens that a sequence may have, for models with full attention
      (pattern "A"). All others need constant memory and ignore it.

  Raises:
    ValueError: batch_size < 1, or max_length is missing where it is needed.
  """
  return State(
    cache=init_cache(config, batch_size, max_length),
    position=jnp.zeros((batch_size,), jnp.int32),
    config=copy.deepcopy(config),
  )


def prefill(
  params: Any,
  tokens: Shaped[Array | np.ndarray, "..."],  # checked by name below
  lengths: Shaped[Array | np.ndarray, "..."],
  state: State,
  *,
  chunk_size: int = CHUNK_SIZE,
) -> tuple[Float[Array, "B VOCAB"], State]:
  """Reads right-padded prompts, continuing from `state`, which is donated.

  Padding does not change the state of a row, so a ragged batch gives the same
  as each prompt alone. Long prompts are read `chunk_size` tokens at a time, and
  the last chunk is padded to a power of two (from 16), so any mix of prompt
  lengths compiles a handful of programs.

  Args:
    params: unboxed parameters of LM(state.config).
    tokens: [B, T] ids; row i is read up to lengths[i], the rest is ignored.
    lengths: [B] tokens of each row, 1 to T.
    state: state of B sequences. Donated: its buffers are reused for the result,
      so continue with the returned state; copy this one first to keep it.
    chunk_size: tokens per dispatch, >= 1; does not change the result beyond
      rounding.

  Returns:
    float32 logits [B, VOCAB] after each row's last token, NaN and infinities of
    the model included; and the new state.

  Raises:
    ValueError: shapes that disagree, numbers that are not integers, parameters
      of another model, a donated state, chunk_size < 1, or (outside of jit) a
      length outside 1..T, an id outside the vocabulary, or more tokens than the
      state has room for.
  """
  require_count("chunk_size", chunk_size)
  require_block(tokens, lengths, state)
  return read(params, tokens, lengths, state, chunk_size)


def read(
  params: Any,
  tokens: Int[Array | np.ndarray, "B T"],
  lengths: Int[Array | np.ndarray, " B"],
  state: State,
  chunk_size: int = CHUNK_SIZE,
) -> tuple[Float[Array, "B VOCAB"], State]:
  """Runs `prefill` unchecked; a length of 0 gives logits of 0."""
  if is_concrete(tokens) and is_concrete(lengths):
    # On the host, because slicing on the device compiles once per length.
    tokens, lengths = jax.device_get((tokens, lengths))
    tokens = tokens[:, : lengths.max()]
  pad = np.pad if is_concrete(tokens) else jnp.pad
  logits = jnp.zeros((state.batch_size, state.config.vocab_size), jnp.float32)
  for start in range(0, tokens.shape[1], chunk_size):
    piece = tokens[:, start : start + chunk_size]
    padding = bucket(piece.shape[1], chunk_size) - piece.shape[1]
    piece = pad(piece, ((0, 0), (0, padding)))
    logits, state = _read_chunk(params, piece, lengths - start, state, logits)
  return logits, state


def bucket(size: int, largest: int) -> int:
  """Smallest power of two >= size and 16, but no more than `largest`."""
  assert 1 <= size <= largest
  return min(largest, max(_SMALLEST_BUCKET, 1 << (size - 1).bit_length()))


def read_chunk(
  params: Any,
  tokens: Int[Array | np.ndarray, "B T"],
  lengths: Int[Array | np.ndarray, " B"],
  state: State,
  logits: Float[Array, "B VOCAB"],
) -> tuple[Float[Array, "B VOCAB"], State]:
  """Reads one chunk of prompts, for use inside a larger jitted function."""
  # A length below 1 means that the row has ended: it keeps its logits.
  x, count, state = read_hidden(params, tokens, lengths, state)
  # Only the last position of a row goes through the head.
  last = jnp.maximum(count - 1, 0)[:, None, None]
  x_last = jnp.take_along_axis(x, last, axis=1)[:, 0]
  new = _head(params, x_last, state)
  return jnp.where(count[:, None] > 0, new, logits), state


_read_chunk = jax.jit(read_chunk, donate_argnames=("state", "logits"))


def extend(
  params: Any,
  tokens: Shaped[Array | np.ndarray, "..."],  # checked by name below
  lengths: Shaped[Array | np.ndarray, "..."],
  state: State,
) -> tuple[Float[Array, "B T VOCAB"], State]:
  """Reads a short block of tokens and returns the logits after each of them.

  Checks a draft of T tokens in one call instead of T. A state cannot be
  rewound: to drop a part of the block, copy the state first and read the kept
  tokens again with smaller `lengths`. Compiles once per T. Waits for the result
  to test that it is finite; inside jit nothing is tested.

  Args:
    params: unboxed parameters of LM(state.config).
    tokens: [B, T] ids; row i is read up to lengths[i], the rest is ignored.
    lengths: [B] tokens of each row, 1 to T.
    state: state of B sequences. Donated: its buffers are reused.

  Returns:
    float32 logits [B, T, VOCAB], [i, j] after token j of row i and valid for
    j < lengths[i]; and the new state.

  Raises:
    ValueError: as `prefill`.
    NonFiniteError: outside of jit, valid logits that are NaN, +inf or all -inf.
      The state of all rows is lost.
  """
  require_block(tokens, lengths, state)
  logits, state, usable = _extend(params, tokens, lengths, state)
  if is_concrete(usable):
    _require_usable(params, state, np.asarray(usable), np.asarray(lengths))
  return logits, state


@functools.partial(jax.jit, donate_argnames=("state",))
def _extend(params, tokens, lengths, state):
  x, count, state = read_hidden(params, tokens, lengths, state)
  logits = _head(params, x, state)
  padding = jnp.arange(x.shape[1])[None] >= count[:, None]
  return logits, state, padding | is_usable(logits)


def _require_usable(params, state, usable, lengths):
  """Raises NonFiniteError unless all of `usable` [B, T] is True."""
  failed = np.flatnonzero(~usable.all(axis=1)).tolist()
  if not failed:
    return
  start = np.asarray(state.position) - lengths
  failures = {}
  for row, cause in find_causes(params, state, failed).items():
    token = int(usable[row].argmin())
    failures[row] = (
      f"non-finite logits after token {token} of the block, at position "
      f"{start[row] + token}: {cause}"
    )
  raise NonFiniteError("tokens", failures)


def read_hidden(
  params: Any,
  tokens: Int[Array | np.ndarray, "B T"],
  lengths: Int[Array | np.ndarray, " B"],
  state: State,
) -> tuple[Float[Array, "B T D"], Int[Array, " B"], State]:
  """Activations, tokens read by each row, and the new state; for use in jit."""
  require_params(params, state.config)
  real = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
  x, cache = LM(state.config).apply(
    {"params": params},
    jnp.where(real, tokens.astype(jnp.int32), 0),
    real.astype(jnp.int32),
    state.cache,
    method="hidden",
  )
  count = real.sum(axis=1, dtype=jnp.int32)
  return x, count, state.replace(cache=cache, position=state.position + count)


def _head(params, x, state):
  logits = LM(state.config).apply({"params": params}, x, method="logits")
  return logits.astype(jnp.float32)


def decode_step(
  params: Any,
  token: Shaped[Array | np.ndarray, "..."],  # checked by name below
  state: State,
) -> tuple[Float[Array, "B VOCAB"], State]:
  """Reads one token per row, continuing from `state`, which is donated.

  Args:
    params: unboxed parameters of LM(state.config).
    token: [B] ids in [0, vocab_size). A NumPy array is checked. A JAX array is
      not, because that would wait for the device: an id outside, or a token
      beyond max_length, gives its row NaN.
    state: state of B sequences. Donated: its buffers are reused.

  Returns:
    float32 logits [B, VOCAB] of the next token, NaN and infinities of the model
    included; and the new state.

  Raises:
    ValueError: batch size or parameters that are not the state's, numbers that
      are not ids, or a donated state.
  """
  require_step(token, state)
  return _decode_step(params, token, state)


def advance(
  params: Any, token: Int[Array, " B"], state: State
) -> tuple[Float[Array, "B VOCAB"], State]:
  """Runs `decode_step` unchecked, for use inside a larger jitted function."""
  require_params(params, state.config)
  logits, cache = LM(state.config).apply(
    {"params": params}, token[:, None].astype(jnp.int32), None, state.cache
  )
  logits = logits[:, 0].astype(jnp.float32)
  position = state.position + 1
  # After 2**31 - 1 tokens the int32 overflows to a negative number.
  logits = jnp.where((position < 0)[:, None], jnp.nan, logits)
  return logits, state.replace(cache=cache, position=position)


_decode_step = jax.jit(advance, donate_argnames=("state",))
