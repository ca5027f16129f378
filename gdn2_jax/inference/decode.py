"""Decoding loop on the device: several tokens of many rows per dispatch."""

import copy
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from gdn2_jax.inference.checks import find_causes, is_usable, require_alive
from gdn2_jax.inference.sampling import sample
from gdn2_jax.inference.state import State, advance
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.lm import without_stacks

TOKENS_PER_DISPATCH = 16
_FAILED = -1  # among the tokens: no finite logits to choose one from


@struct.dataclass
class Rows:
  """Inputs of the next tokens of B rows, beside their state.

  A row's `token` is chosen, but its state has not read it.

  Attributes:
    token: [B] int32, the last token: of the prompt, or chosen.
    index: [B] int32, tokens chosen so far; the next is drawn with
      fold_in(key, index).
    limit: [B] int32, the index at which a row ends.
    done: [B] bool, a row ended: at its limit, at a stop id, or because its
      logits were not finite.
    key: [B] typed keys.
    stops: [B, S] int32 stop ids; -1 is none.
    sampler: Sampler for all rows, or RowSamplers.
  """

  # Any: tree transformations build rows of other things than arrays.
  token: Any
  index: Any
  limit: Any
  done: Any
  key: Any
  stops: Any
  sampler: Any


def for_loop(params: Any, config: ModelConfig) -> Any:
  """Parameters as `decode`'s loop reads them; made once for many dispatches.

  Parameters of layers that are stacked and unrolled are copied out of their
  stack, which takes their memory a second time for as long as the result
  lives. All others are `params` themselves.
  """
  _, alone = without_stacks({}, config)
  if alone is config:
    return params
  # A copy, as in `init_state`: the config is a key of jit's cache.
  return _copied(params, copy.deepcopy(config))


@functools.partial(jax.jit, static_argnums=1)
def _copied(params, config):
  return without_stacks(params, config)[0]


@functools.partial(
  jax.jit, static_argnames=("size",), donate_argnames=("state",)
)
def decode_block(
  params: Any, state: State, rows: Rows, count: Any, pause: Any, *, size: int
) -> tuple[Any, State, Rows]:
  """Chooses up to `count` <= size tokens of every row that is not done.

  Ends early when every row is done or, if `pause`, as soon as another row is:
  only then has that row's state read exactly the tokens before its last.
  A row that is done keeps token and index, but its state reads on. `state` is
  donated. `count` and `pause` are not static: one program serves all. `params`
  are those of LM(state.config), or `for_loop` of them, which saves their copy.

  Returns:
    Tokens [B, size] int32, of which row i has the first (new index - old index)
    columns, followed by -1 if its logits were not finite; new state; new rows.
  """
  before, config = rows.done, state.config
  params, own_config = without_stacks(params, config)

  def unfinished(loop):
    column, _, _, rows = loop
    another = (rows.done & ~before).any()
    return (column < count) & ~rows.done.all() & ~(pause & another)

  def body(loop):
    column, tokens, state, rows = loop
    logits, state = advance(params, rows.token, state)
    rows, token = _choose(logits, rows)
    tokens = jax.lax.dynamic_update_slice_in_dim(
      tokens, token[:, None], column, axis=1
    )
    return column + 1, tokens, state, rows

  tokens = jnp.zeros((state.batch_size, size), jnp.int32)
  start = jnp.zeros((), jnp.int32), tokens, state.replace(config=own_config)
  _, tokens, state, rows = jax.lax.while_loop(unfinished, body, (*start, rows))
  return tokens, state.replace(config=config), rows


def _choose(logits, rows):
  """Adds a token to every row that is not done; returns rows and tokens."""
  failed = ~rows.done & ~is_usable(logits)
  keys = jax.vmap(jax.random.fold_in)(rows.key, rows.index)
  drawn = sample(logits, keys, rows.sampler)
  over = rows.done | failed
  token = jnp.where(over, rows.token, drawn)
  index = rows.index + ~over
  stopped = (token[:, None] == rows.stops).any(axis=1)
  done = over | stopped | (index >= rows.limit)
  rows = rows.replace(token=token, index=index, done=done)
  return rows, jnp.where(failed, _FAILED, token)


def decode(
  params: Any,
  state: State,
  rows: Rows,
  *,
  count: int,
  size: int = TOKENS_PER_DISPATCH,
  pause: bool = False,
  loop_params: Any = None,
) -> tuple[list[list[int]], dict[int, str], State, Rows]:
  """Runs `decode_block`; `index` and `stops` of the rows are on the host.

  `loop_params` are `for_loop` of the parameters; None copies them here.

  Returns:
    The new tokens of each row, without the stop id that ended it; failures by
    row; the new state; and new rows with token, index and done on the host.
  """
  require_alive(state)
  read = params if loop_params is None else loop_params
  tokens, state, new = decode_block(
    read, state, rows, np.int32(count), np.bool_(pause), size=size
  )
  tokens, token, index, done = jax.device_get(
    (tokens, new.token, new.index, new.done)
  )
  chosen = [
    _without_stop(row[:n].tolist(), stops)
    for row, n, stops in zip(
      tokens, index - rows.index, rows.stops, strict=True
    )
  ]
  # Copies: what comes from the device may be read-only.
  rows = rows.replace(
    token=np.array(token), index=np.array(index), done=np.array(done)
  )
  failed = np.flatnonzero((tokens == _FAILED).any(axis=1)).tolist()
  failures = {}
  if failed:
    where = "non-finite logits at index {} of the chosen tokens: "
    failures = {
      row: where.format(index[row]) + cause
      for row, cause in find_causes(params, state, failed).items()
    }
  return chosen, failures, state, rows


def _without_stop(tokens, stops) -> list[int]:
  return tokens[:-1] if tokens and tokens[-1] in stops else tokens


def pad_stops(stop_ids: Sequence[Sequence[int]]) -> np.ndarray:
  """[B, S] int32, S a multiple of 8: few shapes, few programs."""
  most = max(len(ids) for ids in stop_ids)
  stops = np.full((len(stop_ids), 8 * max(1, -(-most // 8))), -1, np.int32)
  for row, ids in zip(stops, stop_ids, strict=True):
    row[: len(ids)] = ids
  return stops
