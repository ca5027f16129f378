"""Rows of a state: copied, joined, split, replaced.

Pure functions for use inside and outside of jit, one dispatch each. Every leaf
of a cache has the rows on axis 1, positions have them on axis 0, and rows are
independent, so all of this is exact: bits move and nothing is computed.
Results share no buffer with their sources, which stay usable even if the result
is donated.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from gdn2_jax.inference.checks import require_alive, require_count
from gdn2_jax.inference.state import State


def fork(state: State, n: int) -> State:
  """`n` copies of each row, side by side: rows 0, 0, ..., 1, 1, ...

  Read a prompt once, then continue it in several ways.

  Args:
    state: state of B sequences; stays usable.
    n: copies of each row, >= 1.

  Returns:
    State of B * n sequences.

  Raises:
    ValueError: n < 1, or a state that was donated.
  """
  require_alive(state)
  require_count("n", n)
  return _take(state, np.repeat(np.arange(state.batch_size), n))


def batch(states: Sequence[State]) -> State:
  """The rows of several states of one model as one state, in order.

  Args:
    states: at least one; each may have any number of rows, which may have read
      any numbers of tokens.

  Returns:
    State of as many sequences as they have together.

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
  return [take(state, [row]) for row in range(state.batch_size)]


def take(
  state: State, rows: Sequence[int] | Int[Array | np.ndarray, " N"]
) -> State:
  """The rows of these indices, in their order; an index may be repeated.

  Args:
    state: state of B sequences; stays usable.
    rows: N >= 1 indices in [0, B). Under jit they may be traced, and then
      their values cannot be checked: one outside gives NaN and position -1.

  Returns:
    State of N sequences.

  Raises:
    ValueError: no index, or (if known) one outside [0, B), or a state that was
      donated.
  """
  require_alive(state)
  return _take(state, _check_rows(rows, state.batch_size))


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
  """Replaces rows by those of another state; in place if jit donates `state`.

  Args:
    state: state of B sequences; stays usable.
    rows: N different indices in [0, B), or one. Under jit they may be traced,
      and then their values cannot be checked: one outside is left out.
    other: state of N sequences, which take these places in this order.

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
  rows = _check_rows(rows, state.batch_size)
  if rows.shape[0] != other.batch_size:
    raise ValueError(
      f"rows: expected {other.batch_size} indices for the rows of other, got "
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
