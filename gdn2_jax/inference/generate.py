"""Generation: prompts in, tokens out, all at once or as they come."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array

from gdn2_jax.inference.checks import require_ids
from gdn2_jax.inference.sampling import Sampler, sample
from gdn2_jax.inference.state import (
  State,
  advance,
  bucket,
  init_state,
  prefill,
)
from gdn2_jax.model.config import ModelConfig

_LARGEST_BUFFER = 1 << 30


@struct.dataclass
class Decoding:
  """Between two dispatches: `token` is chosen, but `state` has not read it.

  Attributes:
    state: State of B sequences.
    token: [B] int32, the last token chosen.
    done: [B] bool, a stop id was chosen.
    kept: [B] int32, tokens chosen before the stop id.
    index: int32, tokens chosen per row, stop ids and later ones included.
  """

  state: Any
  token: Any
  done: Any
  kept: Any
  index: Any


def generate(
  params: Any,
  config: ModelConfig,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  *,
  rng: Array,
  sampler: Sampler = Sampler(),  # noqa: B008, frozen
  stop_ids: Sequence[int] = (),
) -> list[list[int]]:
  """Continues a batch of prompts of any lengths.

  Decoding is one dispatch: a loop on the device, whose memory grows with
  max_new_tokens only by the int32 output, and which ends early once every
  row has met a stop id. Row i draws its n-th token with a key that depends
  on (rng, i, n) alone.

  Args:
    params: unboxed parameters of LM(config).
    config: of the model.
    prompts: B non-empty lists of token ids.
    max_new_tokens: >= 1.
    rng: one typed key, as from `jax.random.key`.
    sampler: how a token is chosen.
    stop_ids: tokens that end a row.

  Returns:
    B lists of at most max_new_tokens ids: without the prompt, and without the
    stop id that ended the row.

  Raises:
    ValueError: an empty prompt, an id outside the vocabulary, a count < 1, an
      untyped key, or a top_k above the vocabulary size.
  """
  _check_request(config, prompts, max_new_tokens, rng, sampler, stop_ids)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(len(prompts)))
  stops = _pad_stops(stop_ids)
  carry = read_prompts(params, config, prompts, keys, stops, sampler)
  columns = [jax.device_get(carry.token)[:, None]]
  if max_new_tokens > 1:
    block, carry = decode_block(
      params,
      carry,
      jnp.asarray(max_new_tokens - 1, jnp.int32),
      keys,
      stops,
      sampler=sampler,
      size=bucket(max_new_tokens - 1, _LARGEST_BUFFER),
    )
    columns.append(jax.device_get(block))
  tokens = np.concatenate(columns, axis=1)
  kept = jax.device_get(carry.kept)
  return [row[:n].tolist() for row, n in zip(tokens, kept, strict=True)]


def stream(
  params: Any,
  config: ModelConfig,
  prompt: Sequence[int],
  max_new_tokens: int,
  *,
  rng: Array,
  sampler: Sampler = Sampler(),  # noqa: B008, frozen
  stop_ids: Sequence[int] = (),
  tokens_per_dispatch: int = 8,
) -> Iterator[int]:
  """Yields the tokens that `generate` gives for [prompt], as they come.

  The first token comes alone, the others `tokens_per_dispatch` at a time.

  Args:
    params: unboxed parameters of LM(config).
    config: of the model.
    prompt: non-empty token ids.
    max_new_tokens: >= 1.
    rng: one typed key.
    sampler: how a token is chosen.
    stop_ids: tokens that end the stream; not yielded.
    tokens_per_dispatch: >= 1; does not change the tokens.

  Returns:
    An iterator of token ids.

  Raises:
    ValueError: as `generate`, at the call and not at the first token.
  """
  _check_request(config, [prompt], max_new_tokens, rng, sampler, stop_ids)
  if tokens_per_dispatch < 1:
    raise ValueError(
      f"tokens_per_dispatch: expected >= 1, got {tokens_per_dispatch}"
    )
  keys = jax.random.fold_in(rng, 0)[None]
  stops = _pad_stops(stop_ids)

  def blocks():
    carry = read_prompts(params, config, [prompt], keys, stops, sampler)
    given = 0
    block = carry.token[:, None]
    while True:
      row, kept, done = jax.device_get((block[0], carry.kept[0], carry.done[0]))
      yield from row[: kept - given].tolist()
      given = int(kept)
      left = max_new_tokens - given
      if done or not left:
        return
      block, carry = decode_block(
        params,
        carry,
        jnp.asarray(min(left, tokens_per_dispatch), jnp.int32),
        keys,
        stops,
        sampler=sampler,
        size=tokens_per_dispatch,
      )

  return blocks()


@functools.partial(
  jax.jit,
  static_argnames=("sampler", "size"),
  donate_argnames=("carry",),
)
def decode_block(params, carry, count, keys, stops, *, sampler, size):
  """Chooses up to `count` <= size further tokens of every row.

  Args:
    params: unboxed parameters.
    carry: where the rows are; donated.
    count: int32 scalar, not static: one program serves every count.
    keys: [B] typed keys.
    stops: [S] int32 stop ids; -1 is none.
    sampler: how a token is chosen.
    size: columns of the output buffer.

  Returns:
    tokens [B, size] int32, columns from `count` on (or from where every row
    was done) zero, and the new carry.
  """
  first = carry.index

  def unfinished(loop):
    _, carry = loop
    return (carry.index < first + count) & ~jnp.all(carry.done)

  def body(loop):
    tokens, carry = loop
    logits, state = advance(params, carry.token, carry.state)
    column = carry.index - first
    carry = _choose(logits, state, carry, keys, stops, sampler)
    tokens = jax.lax.dynamic_update_slice_in_dim(
      tokens, carry.token[:, None], column, axis=1
    )
    return tokens, carry

  tokens = jnp.zeros((carry.token.shape[0], size), jnp.int32)
  return jax.lax.while_loop(unfinished, body, (tokens, carry))


def _choose(logits, state, carry, keys, stops, sampler):
  """Samples one token of each row; `carry` gives done, kept and index."""
  step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, carry.index)
  token = sample(logits, step_keys, sampler)
  done = carry.done | (token[:, None] == stops[None]).any(axis=1)
  return Decoding(
    state=state,
    token=token,
    done=done,
    kept=carry.kept + ~done,
    index=carry.index + 1,
  )


def read_prompts(params, config, prompts, keys, stops, sampler) -> Decoding:
  """Prefills and chooses the first token of each row.

  Args:
    params: unboxed parameters.
    config: of the model.
    prompts: B non-empty lists of token ids.
    keys: [B] typed keys, one per row.
    stops: [S] int32 stop ids; -1 is none.
    sampler: how a token is chosen.
  """
  lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
  tokens = np.zeros((len(prompts), lengths.max()), np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    row[: len(prompt)] = prompt
  state = init_state(config, len(prompts))
  logits, state = prefill(params, tokens, lengths, state)
  return _first_token(logits, state, keys, stops, sampler=sampler)


@functools.partial(jax.jit, static_argnames=("sampler",))
def _first_token(logits, state: State, keys, stops, *, sampler):
  batch_size = logits.shape[0]
  before = Decoding(
    state=state,
    token=jnp.zeros((batch_size,), jnp.int32),
    done=jnp.zeros((batch_size,), bool),
    kept=jnp.zeros((batch_size,), jnp.int32),
    index=jnp.zeros((), jnp.int32),
  )
  return _choose(logits, state, before, keys, stops, sampler)


def _pad_stops(stop_ids):
  """int32, padded with -1 to a multiple of 8: few shapes, few programs."""
  stops = np.full(8 * max(1, -(-len(stop_ids) // 8)), -1, np.int32)
  stops[: len(stop_ids)] = stop_ids
  return jnp.asarray(stops)


def _check_request(config, prompts, max_new_tokens, rng, sampler, stop_ids):
  if max_new_tokens < 1:
    raise ValueError(f"max_new_tokens: expected >= 1, got {max_new_tokens}")
  if not len(prompts):
    raise ValueError("prompts: expected at least one prompt, got none")
  if not jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
    raise ValueError(
      "rng: expected a typed key as from jax.random.key(seed), got an array "
      f"of {rng.dtype}"
    )
  sampler.check(config.vocab_size)
  require_ids("stop_ids", stop_ids, config.vocab_size)
  for i, prompt in enumerate(prompts):
    if not len(prompt):
      raise ValueError(f"prompts[{i}]: expected at least one token, got none")
    require_ids(f"prompts[{i}]", prompt, config.vocab_size)
