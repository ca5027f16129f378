"""The state of a batch of sequences, and the steps that advance it.

Everything here is a pure function of (parameters, tokens, state). The state
has the same size whatever number of tokens it has seen (but for models with
full attention, whose memory is made for a number of tokens in advance).
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
from gdn2_jax.model.kv_cache import KVCache
from gdn2_jax.model.lm import LM, init_cache

CHUNK_SIZE = 512  # tokens that one prefill dispatch takes, per row
_SMALLEST_BUCKET = 16


@struct.dataclass
class State:
  """What a batch of sequences remembers: an immutable pytree.

  Attributes:
    cache: of the model, leaves [groups, B, ...].
    position: [B] int32, tokens read by each row.
    config: of the model; static, a part of the tree's structure.
  """

  # Any: tree transformations build states of other things than arrays.
  cache: Any
  position: Any
  config: ModelConfig = struct.field(pytree_node=False)

  @property
  def batch_size(self) -> Any:
    """Sequences B, an int, or a symbol in programs that take any number."""
    return self.position.shape[0]

  @property
  def max_length(self) -> int | None:
    """Tokens that a sequence may have; None: as many as you like."""
    for part in self.cache:
      if isinstance(part, KVCache):
        return part.k.shape[-2]
    return None


def init_state(
  config: ModelConfig, batch_size: int, max_length: int | None = None
) -> State:
  """Returns the state of `batch_size` sequences that have seen nothing.

  Args:
    config: of the model; copied, so that later changes do not reach the state.
    batch_size: sequences B, >= 1.
    max_length: tokens that a sequence may have in the end, for models with
      full attention (pattern "A"). All others remember in constant memory and
      ignore it.

  Raises:
    ValueError: batch_size < 1, or a max_length that is needed and missing.
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
    float32 logits [B, VOCAB] after each row's last token, as the model gives
    them, NaN and infinities included; and the new state.

  Raises:
    ValueError: shapes that disagree, numbers that are not integers, parameters
      of another model, a state that was donated before, chunk_size < 1, or (if
      known outside of jit) a length outside 1..T, an id outside the
      vocabulary, or more tokens than the state has room for.
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
  """`prefill` unchecked; lengths may be 0, where logits come out as 0."""
  if is_concrete(tokens) and is_concrete(lengths):
    # On the host: cutting arrays on the device compiles once per length.
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
  """The smallest power of two >= size and 16, but no more than `largest`."""
  assert 1 <= size <= largest
  return min(largest, max(_SMALLEST_BUCKET, 1 << (size - 1).bit_length()))


def read_chunk(
  params: Any,
  tokens: Int[Array | np.ndarray, "B T"],
  lengths: Int[Array | np.ndarray, " B"],
  state: State,
  logits: Float[Array, "B VOCAB"],
) -> tuple[Float[Array, "B VOCAB"], State]:
  """One chunk without its jit, for use inside a larger jitted function.

  Lengths may be below 1 (row over, keeps its logits) or above T (goes on).
  """
  x, count, state = _hidden(params, tokens, lengths, state)
  # The head is applied to one position per row, not to all of them.
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

  What `prefill` is to a prompt this is to a draft: whether a model agrees with
  T tokens costs one call instead of T. The state cannot be taken back by some
  tokens: to drop a part of the block, copy the state before, and read what is
  kept again with smaller `lengths`. Compiles once per T. Waits for the result,
  to look whether it is finite; inside jit it returns what the model gives.

  Args:
    params: unboxed parameters of LM(state.config).
    tokens: [B, T] ids; row i is read up to lengths[i], the rest is ignored.
    lengths: [B] tokens of each row, 1 to T.
    state: of B sequences. Donated: its buffers are reused for the result.

  Returns:
    float32 logits [B, T, VOCAB], of which [i, j] follow token j of row i and
    mean something for j < lengths[i]; and the new state.

  Raises:
    ValueError: as `prefill`.
    NonFiniteError: outside of jit, logits that mean something and are NaN,
      +inf or nothing but -inf. The state is lost, that of all rows.
  """
  require_block(tokens, lengths, state)
  logits, state, usable = _extend(params, tokens, lengths, state)
  if is_concrete(usable):
    _require_usable(params, state, np.asarray(usable), np.asarray(lengths))
  return logits, state


@functools.partial(jax.jit, donate_argnames=("state",))
def _extend(params, tokens, lengths, state):
  x, count, state = _hidden(params, tokens, lengths, state)
  logits = _head(params, x, state)
  padding = jnp.arange(x.shape[1])[None] >= count[:, None]
  return logits, state, padding | is_usable(logits)


def _require_usable(params, state, usable, lengths):
  """Raises NonFiniteError unless all of `usable` [B, T] are."""
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


def _hidden(params, tokens, lengths, state):
  """Activations [B, T, D], tokens read by each row [B], and the new state."""
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
    token: [B] ids in [0, vocab_size). Those of a NumPy array are checked; to
      look at those of a JAX array would wait for the device, so there an id
      outside gives its row NaN, as does a token that there is no room for.
    state: of B sequences. Donated: its buffers are reused for the result.

  Returns:
    float32 logits [B, VOCAB] of the next token, as the model gives them, NaN
    and infinities included; and the new state.

  Raises:
    ValueError: another batch size or other parameters than the state's,
      numbers that are not ids, or a state that was donated before.
  """
  require_step(token, state)
  return _decode_step(params, token, state)


def advance(
  params: Any, token: Int[Array, " B"], state: State
) -> tuple[Float[Array, "B VOCAB"], State]:
  """`decode_step` without its jit, for use inside a larger jitted function."""
  require_params(params, state.config)
  logits, cache = LM(state.config).apply(
    {"params": params}, token[:, None].astype(jnp.int32), None, state.cache
  )
  logits = logits[:, 0].astype(jnp.float32)
  position = state.position + 1
  # Past 2**31 - 1 tokens it turns negative: say so, whatever the model can do.
  logits = jnp.where((position < 0)[:, None], jnp.nan, logits)
  return logits, state.replace(cache=cache, position=position)


_decode_step = jax.jit(advance, donate_argnames=("state",))
