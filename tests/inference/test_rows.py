"""Rows of states: bits move, nothing is computed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.inference.rows import batch, fork, put, take, unbatch
from tests.inference.states import CONFIG, assert_equal, random_state

# Without optimizations a NaN of bfloat16 loses bits on its way through float32.
pytestmark = pytest.mark.usefixtures("optimized")


def rows_of(state, rows):
  """These rows by the documented layout, on the host."""
  state = jax.device_get(state)
  return state.replace(
    cache=jax.tree.map(lambda x: np.take(x, rows, axis=1), state.cache),
    position=state.position[rows],
  )


def stacked(*states):
  states = jax.device_get(states)
  return states[0].replace(
    cache=jax.tree.map(
      lambda *x: np.concatenate(x, axis=1), *(s.cache for s in states)
    ),
    position=np.concatenate([s.position for s in states]),
  )


def test_fork_puts_copies_of_a_row_side_by_side():
  state = random_state(2)
  assert_equal(fork(state, 3), rows_of(state, [0, 0, 0, 1, 1, 1]))


def test_unbatch_undoes_batch():
  parts = [random_state(1), random_state(2, seed=1)]
  together = batch(parts)
  assert_equal(together, stacked(*parts))
  rows = unbatch(together)
  assert len(rows) == 3
  for i, row in enumerate(rows):
    assert_equal(row, rows_of(together, [i]))
  assert_equal(batch(rows), together)


def test_take_orders_repeats_and_drops():
  state = random_state(3)
  want = rows_of(state, [2, 0, 2])
  for rows in ([2, 0, 2], np.array([2, 0, 2]), jnp.array([2, 0, 2])):
    assert_equal(take(state, rows), want)


def test_put_replaces_the_named_rows_and_no_other():
  state, new = random_state(3), random_state(2, seed=1)
  both = stacked(state, new)
  assert_equal(put(state, [2, 0], new), rows_of(both, [4, 1, 3]))
  one = random_state(1, seed=1)
  want = rows_of(stacked(state, one), [0, 3, 2])
  for index in (1, np.int32(1), jnp.int32(1), [1]):
    assert_equal(put(state, index, one), want)
  # All of these are pure: `state` is what it was.
  assert_equal(state, random_state(3))


def test_results_share_no_buffer_with_their_source():
  """A result may be donated, as to prefill: the source stays."""
  state = random_state(1)
  results = [
    fork(state, 1),
    batch([state]),
    unbatch(state)[0],
    take(state, [0]),
    put(state, 0, state),
  ]
  for result in results:
    assert_equal(result, random_state(1))
    jax.tree.map(lambda x: x.delete(), result)
  assert_equal(state, random_state(1))
  with pytest.raises(ValueError, match="state: was donated"):
    fork(results[0], 2)


def test_all_run_inside_jit_and_put_in_place():
  state, new = random_state(3), random_state(1, seed=1)
  want = rows_of(stacked(state, new), [0, 3, 2])

  @functools.partial(jax.jit, donate_argnums=0)
  def replace(state, index, new):
    return put(state, index, new)

  # Buffers of JAX's own: those that it borrows from NumPy cannot be donated.
  state = jax.tree.map(jnp.copy, state)
  places = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
  state = replace(state, jnp.int32(1), new)
  assert_equal(state, want)
  now = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
  assert now == places

  @jax.jit
  def shuffle(state, rows):
    forked = fork(take(state, rows), 2)
    return take(batch([*unbatch(forked), state]), rows)

  # Rows 2 and 0 forked: 2 2 0 0, then 0 1 2; of these again rows 2 and 0.
  got = shuffle(state, jnp.array([2, 0]))
  assert_equal(got, rows_of(state, [0, 2]))


def test_traced_rows_outside_touch_no_row():
  state, new = random_state(2), random_state(1, seed=1)
  traced_put, traced_take = jax.jit(put), jax.jit(take)
  for index in (-1, 2):
    assert_equal(traced_put(state, jnp.int32(index), new), state)
    missing = jax.device_get(traced_take(state, jnp.array([index])))
    assert missing.position.tolist() == [-1]
    for x in jax.tree.leaves(missing):
      if jnp.issubdtype(x.dtype, jnp.floating):
        assert np.isnan(x.astype(np.float32)).all()


def test_wrong_rows_and_other_models_are_refused():
  other = dataclasses.replace(CONFIG, norm_eps=1e-6)
  state, one = random_state(2), random_state(1)
  stranger = one.replace(config=other)
  longer = one.replace(
    cache=jax.tree.map(lambda x: jnp.asarray([[[0.0]]]), one.cache)
  )
  refusals = [
    (lambda: fork(state, 0), "n: expected >= 1, got 0"),
    (lambda: batch([]), "states: expected at least one"),
    (
      lambda: batch([state, stranger]),
      r"states\[1\]: a state of another model",
    ),
    (lambda: batch([state, longer]), r"states\[1\]: leaves of shape"),
    (lambda: put(state, 0, stranger), "other: a state of another model"),
    (lambda: take(state, []), "rows: expected at least one index"),
    (lambda: take(state, [0, 2]), r"rows: expected indices in \[0, 2\)"),
    (lambda: take(state, [-1]), r"rows: expected indices in \[0, 2\)"),
    (lambda: put(state, 2, one), r"rows: expected indices in \[0, 2\)"),
    (lambda: put(state, [0], state), "rows: expected 2 indices"),
    (lambda: put(state, [1, 1], state), "rows: expected different rows"),
  ]
  for refused, message in refusals:
    with pytest.raises(ValueError, match=message):
      refused()
