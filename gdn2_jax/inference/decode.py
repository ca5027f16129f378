"""Decoding loop on the device: many tokens of many rows per dispatch."""

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

TOKENS_PER_DISPATCH = 16
_FAILED = -1  # in place of a token: its logits were not finite


@struct.dataclass
class Rows:
  """Progress and sampling settings of B rows, beside their state."""

  # Any: tree transformations build rows of other things than arrays.
  token: Any  # [B] int32, the last token; the state has not read it
  index: Any  # [B] int32, tokens chosen; the next uses fold_in(key, index)
  limit: Any  # [B] int32, the index at which a row ends
  done: Any  # [B] bool: at the limit, at a stop id, or without finite logits
  key: Any  # [B] typed keys
  stops: Any  # [B, S] int32 stop ids, padded with -1
  sampler: Any  # Sampler for all rows, or RowSamplers


@functools.partial(
  jax.jit, static_argnames=("size",), donate_argnames=("state",)
)
def decode_block(
  params: Any, state: State, rows: Rows, count: Any, pause: Any, *, size: int
) -> tuple[Any, State, Rows]:
  """Chooses up to `count` <= size tokens of every row that is not done."""
  # `count` and `pause` are not static: one program serves all their values.
  # Returns tokens [B, size], of which row i has (new index - old index), then
  # -1 if its logits were not finite. A row that is done keeps token and index,
  # but its state reads on; `pause` ends the loop there, so that the state of a
  # row that has just ended has read exactly the tokens before its last.
  before = rows.done

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
  start = (jnp.zeros((), jnp.int32), tokens, state, rows)
  _, tokens, state, rows = jax.lax.while_loop(unfinished, body, start)
  return tokens, state, rows


def _choose(logits, rows):
  """Draws one token for every row that is not done."""
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
) -> tuple[list[list[int]], dict[int, str], State, Rows]:
  """Runs `decode_block`; returns tokens, failures by row, state and rows."""
  # On the host, in and out: token, index and done of `rows`. Tokens come
  # without the stop id that ended a row.
  require_alive(state)
  tokens, state, new = decode_block(
    params, state, rows, np.int32(count), np.bool_(pause), size=size
  )
  tokens, token, index, done = jax.device_get(
    (tokens, new.token, new.index, new.done)
  )
  chosen = []
  for row, n, stops in zip(tokens, index - rows.index, rows.stops, strict=True):
    stopped = n > 0 and row[n - 1] in stops
    chosen.append(row[: n - stopped].tolist())
  # Copies, because arrays from the device may be read-only.
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


def pad_stops(stop_ids: Sequence[Sequence[int]]) -> np.ndarray:
  """Stop ids [B, S], S a multiple of 8 so that few programs are compiled."""
  most = max(len(ids) for ids in stop_ids)
  stops = np.full((len(stop_ids), 8 * max(1, -(-most // 8))), -1, np.int32)
  for row, ids in zip(stops, stop_ids, strict=True):
    row[: len(ids)] = ids
  return stops
