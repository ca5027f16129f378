"""Text generation: a whole batch at once, or one prompt as a stream."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array

from gdn2_jax.inference.checks import NonFiniteError, require_count
from gdn2_jax.inference.decode import TOKENS_PER_DISPATCH, decode, for_loop
from gdn2_jax.inference.request import Request
from gdn2_jax.inference.rows import put, take
from gdn2_jax.inference.sampling import Sampler
from gdn2_jax.inference.state import State
from gdn2_jax.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Generated:
  """Result of `generate` with return_state: the start of a continuation.

  Attributes:
    tokens: B lists of ids.
    state: state of B sequences, each of which has read its prompt and all
      tokens chosen for it but the last.
    pending: [B] last token chosen for each row: the last of its `tokens`, or
      the stop id that ended it. The next prompt of the row begins with it.
    index: [B] tokens chosen for each row so far, stop ids included.
  """

  tokens: list[list[int]]
  state: State
  pending: list[int]
  index: list[int]


def generate(
  params: Any,
  config: ModelConfig,
  prompts: Sequence[Any],  # lists of ids, checked by name
  max_new_tokens: int,
  *,
  rng: Array,
  sampler: Sampler = Sampler(),  # noqa: B008, frozen
  stop_ids: Sequence[int] = (),
  state: State | None = None,
  index: int | Sequence[int] = 0,
  on_tokens: Callable[[int, list[int]], Any] | None = None,
  return_state: bool = False,
  tokens_per_dispatch: int = TOKENS_PER_DISPATCH,
) -> list[list[int]] | Generated:
  """Continues a batch of prompts of any lengths.

  Row i draws its n-th token with a key that depends on (rng, i, n) alone. The
  loop over tokens is on the device, `tokens_per_dispatch` at a time, and ends
  once every row is done.

  Args:
    params: unboxed parameters of LM(config).
    config: model config.
    prompts: B non-empty lists of token ids.
    max_new_tokens: tokens per row at most, >= 1.
    rng: one typed key, as from `jax.random.key`.
    sampler: temperature, top_k and top_p.
    stop_ids: tokens that end a row.
    state: state of B sequences that the prompts continue; donated. None starts
      from an empty state.
    index: n of the first token, one for all rows or one per row.
    on_tokens: called as on_tokens(i, ids) with the new tokens of row i, first
      with one and then with up to tokens_per_dispatch; returning True ends the
      row there.
    return_state: return a `Generated`. Then

        first = generate(params, config, prompts, n, rng=rng, return_state=True)
        more = generate(
          params, config, [[token] for token in first.pending], m, rng=rng,
          state=first.state, index=first.index)

      gives in two calls, bit for bit, what one call gives for n + m tokens.
    tokens_per_dispatch: >= 1; does not change the tokens.

  Returns:
    B lists of at most max_new_tokens ids, without the prompt and without the
    stop id that ended the row. With return_state a `Generated`.

  Raises:
    ValueError: an empty prompt, an id outside the vocabulary, a count < 1, an
      untyped key, a top_k above the vocabulary size, a state of another model
      or batch size, or more tokens than it has room for.
    NonFiniteError: logits of the model that are NaN, +inf or all -inf; raised
      once all other rows are done. It names the row, the index of the token
      and the cause, and has the `tokens` of all rows.
  """
  request = Request(
    config, prompts, max_new_tokens, rng, sampler, stop_ids, state, index
  )
  require_count("tokens_per_dispatch", tokens_per_dispatch)
  state, rows = request.begin(params)
  loop_params = for_loop(params, config)
  size = tokens_per_dispatch
  tokens = [[] for _ in prompts]
  ended, failures = {}, {}
  count = 1 if on_tokens else size
  while not rows.done.all():
    before = rows.done
    new, failed, state, rows = decode(
      params,
      state,
      rows,
      count=count,
      size=size,
      pause=return_state,
      loop_params=loop_params,
    )
    failures |= failed
    for row, ids in enumerate(new):
      tokens[row] += ids
      if on_tokens and ids and on_tokens(row, ids):
        rows.done[row] = True
    if return_state and not rows.done.all():
      # Kept now: while other rows decode, this row's state reads on.
      for row in np.flatnonzero(rows.done & ~before).tolist():
        ended[row] = take(state, [row])
    count = size
  if failures:
    raise NonFiniteError("prompts", failures, tokens)
  if not return_state:
    return tokens
  for row, final in ended.items():
    state = put(state, row, final)
  return Generated(tokens, state, rows.token.tolist(), rows.index.tolist())


def stream(
  params: Any,
  config: ModelConfig,
  prompt: Any,  # list of ids, checked by name
  max_new_tokens: int,
  *,
  rng: Array,
  sampler: Sampler = Sampler(),  # noqa: B008, frozen
  stop_ids: Sequence[int] = (),
  state: State | None = None,
  index: int = 0,
  tokens_per_dispatch: int = TOKENS_PER_DISPATCH,
) -> Iterator[int]:
  """Yields the tokens that `generate` gives for [prompt], as they come.

  The first token comes alone, the others `tokens_per_dispatch` at a time.
  Arguments as `generate`, for one prompt and one sequence.

  Raises:
    ValueError: as `generate`, at the call and not at the first token.
    NonFiniteError: as `generate`, from the iterator, in place of the token
      that has no finite logits.
  """
  request = Request(
    config, [prompt], max_new_tokens, rng, sampler, stop_ids, state, index
  )
  require_count("tokens_per_dispatch", tokens_per_dispatch)

  def tokens():
    state, rows = request.begin(params)
    loop_params, count = for_loop(params, config), 1
    while not rows.done.all():
      (new,), failures, state, rows = decode(
        params,
        state,
        rows,
        count=count,
        size=tokens_per_dispatch,
        loop_params=loop_params,
      )
      yield from new
      if failures:
        raise NonFiniteError("prompts", failures)
      count = tokens_per_dispatch

  return tokens()
