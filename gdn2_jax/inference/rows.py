"""Rows of a state: copied, put together, taken apart, replaced.

Pure functions for use inside and outside of jit, one dispatch each. Every leaf
of a cache has the rows on axis 1, positions have them on axis 0, and no row
knows of another, so all of this is exact: bits move and nothing is computed.
Results share no buffer with their sources, which stay usable even where the
result is donated.
"""

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from gdn2_jax.inference.checks import require_alive
from gdn2_jax.inference.state import State


def fork(state: State, n: int) -> State:
  """`n` copies of each row, side by side: rows 0, 0, ..., 1, 1, ...

  Read a prompt once, then continue it in several ways.

  Args:
    state: of B sequences; stays usable.
    n: >= 1.

  Returns:
    A state of B * n sequences.

  Raises:
    ValueError: n < 1, or a state that was donated.
  """
  require_alive(state)
  n = operator.index(n)
  if n < 1:
    raise ValueError(f"n: expected >= 1, got {n}")
  return _fork(state, n=n)


@functools.partial(jax.jit, static_argnames=("n",))
def _fork(state, *, n):
  return _map(lambda axis, x: jnp.repeat(x, n, axis=axis), state)


def batch(states: Sequence[State]) -> State:
  """The rows of several states of one model as one state, in order.

  Args:
    states: at least one; they may have any numbers of rows and have seen any
      numbers of tokens.

  Returns:
    A state of as many sequences as they have together.

  Raises:
    ValueError: no state, or states of different models or capacities.
  """
  states = list(states)
  if not states:
    raise ValueError("states: expected at least one state, got none")
  for i, state in enumerate(states):
    require_alive(state)
    _check_alike(f"states[{i}]", state, states[0])
  return _batch(tuple(states))


@jax.jit
def _batch(states):
  return _map(lambda axis, *x: jnp.concatenate(x, axis=axis), *states)


def unbatch(state: State) -> list[State]:
  """Every row as a state of one sequence; the inverse of `batch`."""
  return [take(state, [row]) for row in range(_rows_of(state))]


def take(
  state: State, rows: Sequence[int] | Int[Array | np.ndarray, " N"]
) -> State:
  """The named rows, in the order named; one may be named several times.

  Args:
    state: of B sequences; stays usable.
    rows: N >= 1 indices in [0, B). Under jit they may be traced, and then
      their values cannot be checked: one outside gives NaN and position -1.

  Returns:
    A state of N sequences.

  Raises:
    ValueError: no index, or (if known) one outside [0, B), or a state that was
      donated.
  """
  require_alive(state)
  return _take(state, _check_rows(rows, _rows_of(state)))


@jax.jit
def _take(state, rows):
  def pick(axis, x):
    missing = jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else -1
    return jnp.take(x, rows, axis=axis, mode="fill", fill_value=missing)

  return _map(pick, state)


def put(
  state: State,
  rows: int | np.integer | Sequence[int] | Int[Array | np.ndarray, "*N"],
  other: State,
) -> State:
  """Replaces rows: a sequence that is over makes room for a new one.

  Inside jit with `state` donated this is done in place.

  Args:
    state: of B sequences; stays usable.
    rows: N different indices in [0, B), or one. Under jit they may be traced,
      and then their values cannot be checked: one outside is left out.
    other: of N sequences, which take these places in this order.

  Returns:
    `state` with these rows replaced.

  Raises:
    ValueError: states of different models or capacities, numbers of rows that
      disagree, or (if known) an index outside [0, B) or named twice.
  """
  require_alive(state)
  require_alive(other)
  _check_alike("other", other, state)
  if np.ndim(rows) == 0:
    rows = rows[None] if isinstance(rows, jax.Array) else [rows]
  rows = _check_rows(rows, _rows_of(state))
  if rows.shape[0] != _rows_of(other):
    raise ValueError(
      f"rows: expected {_rows_of(other)} indices for the rows of other, got "
      f"{rows.shape[0]}"
    )
  if isinstance(rows, np.ndarray) and len(set(rows.tolist())) != len(rows):
    raise ValueError(f"rows: expected different rows, got {rows.tolist()}")
  return _put(state, rows, other)


@jax.jit
def _put(state, rows, other):
  def replace(axis, x, new):
    where = (slice(None),) * axis + (rows,)
    return x.at[where].set(new, mode="drop")

  return _map(replace, state, other)


def _rows_of(state: State) -> int:
  return state.position.shape[0]


def _map(f, state: State, *others: State) -> State:
  """f(axis of the rows, leaf, *leaves of others) over all leaves."""
  return state.replace(
    cache=jax.tree.map(
      lambda *x: f(1, *x), state.cache, *(o.cache for o in others)
    ),
    position=f(0, state.position, *(o.position for o in others)),
  )


def _check_alike(name: str, state: State, like: State) -> None:
  if state.config != like.config:
    raise ValueError(
      f"{name}: a state of another model than the first: {state.config}, "
      f"expected {like.config}"
    )

  def row_shape(x):
    return (x.dtype, x.shape[0], *x.shape[2:])

  leaves = zip(
    jax.tree.leaves(state.cache), jax.tree.leaves(like.cache), strict=True
  )
  for got, want in leaves:
    if row_shape(got) != row_shape(want):
      raise ValueError(
        f"{name}: leaves of shape {got.shape} and dtype {got.dtype}, expected "
        f"{want.shape} up to the rows and {want.dtype}: was it made with "
        "another max_length?"
      )


def _check_rows(rows, batch_size):
  """Row numbers as a numpy array, or as they are where they are traced."""
  if not isinstance(rows, jax.core.Tracer):
    rows = np.asarray(jax.device_get(rows))
  if rows.ndim != 1 or rows.shape[0] < 1:
    raise ValueError(f"rows: expected at least one index, got {rows.shape}")
  if isinstance(rows, jax.core.Tracer):
    # A negative index would count from the end, traced or not.
    return jnp.where(rows < 0, batch_size, rows)
  if rows.min() < 0 or rows.max() >= batch_size:
    raise ValueError(
      f"rows: expected indices in [0, {batch_size}), got {rows.tolist()}"
    )
  return rows
