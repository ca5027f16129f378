"""Rows of states: nothing but bits that move."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.inference.rows import batch, fork, put, take, unbatch
from gdn2_jax.inference.state import init_state
from gdn2_jax.model.attention import AttentionConfig
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.gdn2 import GDN2Config


@pytest.fixture(params=["G", "GS"])
def config(request):
  # bfloat16: tails and rings of another dtype than the recurrent states.
  return make_config(request.param, dtype="bfloat16")


def make_config(pattern, **changes):
  """As `conftest.make_tiny`, without computing its logits."""
  return ModelConfig(
    vocab_size=61,
    model_dim=32,
    num_layers=2 * len(pattern),
    pattern=pattern,
    gdn2=GDN2Config(num_heads=2, key_dim=16, value_dim=16),
    attention=AttentionConfig(num_heads=2, head_dim=16, window=8),
    mlp_dim=48,
    **changes,
  )


def random_state(config, batch_size, seed=0):
  """A state with every bit drawn, NaN, infinities and -0 among them."""
  rng = np.random.default_rng(seed)

  def draw(x):
    bits = rng.bytes(x.size * x.dtype.itemsize)
    return jnp.asarray(np.frombuffer(bits, x.dtype).reshape(x.shape))

  return jax.tree.map(draw, init_state(config, batch_size))


def bits(x):
  return np.ascontiguousarray(jax.device_get(x)).view(np.uint8)


def assert_equal(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype and a.shape == b.shape
    np.testing.assert_array_equal(bits(a), bits(b))


def row(state, i):
  """Row i by the layout that the module promises, not by its functions."""
  return state.replace(
    cache=jax.tree.map(lambda x: x[:, i : i + 1], state.cache),
    position=state.position[i : i + 1],
  )


def test_fork_puts_copies_of_a_row_side_by_side(config):
  state = random_state(config, 2)
  forked = fork(state, 3)
  assert forked.position.shape == (6,)
  for i, copy in enumerate(unbatch(forked)):
    assert_equal(copy, row(state, i // 3))
  assert_equal(fork(state, 1), state)


def test_unbatch_undoes_batch(config):
  parts = [random_state(config, n, seed=n) for n in (1, 2, 1)]
  together = batch(parts)
  want = [row(part, i) for part in parts for i in range(len(part.position))]
  assert len(unbatch(together)) == 4
  for got, expected in zip(unbatch(together), want, strict=True):
    assert_equal(got, expected)
  assert_equal(batch(unbatch(together)), together)


def test_take_orders_repeats_and_drops(config):
  state = random_state(config, 3)
  want = batch([row(state, i) for i in (2, 0, 2)])
  for rows in ([2, 0, 2], np.array([2, 0, 2]), jnp.array([2, 0, 2])):
    assert_equal(take(state, rows), want)


def test_put_replaces_the_named_rows_and_no_other(config):
  state, new = random_state(config, 3), random_state(config, 2, seed=1)
  got = put(state, [2, 0], new)
  want = batch([row(new, 1), row(state, 1), row(new, 0)])
  assert_equal(got, want)
  for index in (1, np.int32(1), jnp.int32(1), [1]):
    assert_equal(
      put(state, index, row(new, 0)),
      batch([row(state, 0), row(new, 0), row(state, 2)]),
    )
  # All of these are pure: `state` is what it was.
  assert_equal(state, random_state(config, 3))


def test_results_share_no_buffer_with_their_source(config):
  """Whoever gives a result away, as prefill asks for, still has the source."""
  state = random_state(config, 1)
  results = [
    fork(state, 1),
    batch([state]),
    unbatch(state)[0],
    take(state, [0]),
    put(state, 0, state),
  ]
  for result in results:
    assert_equal(result, random_state(config, 1))
    jax.tree.map(lambda x: x.delete(), result)
  assert_equal(state, random_state(config, 1))


def test_all_run_inside_jit_and_put_in_place():
  config = make_config("GS")
  state, new = random_state(config, 3), random_state(config, 1, seed=1)
  expected = put(state, 1, new)

  @functools.partial(jax.jit, donate_argnums=0)
  def replace(state, index, new):
    return put(state, index, new)

  old = jax.tree.leaves(state)
  places = [x.unsafe_buffer_pointer() for x in old]
  got = replace(state, jnp.int32(1), new)
  assert_equal(got, expected)
  assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(got)] == places

  @jax.jit
  def shuffle(state, rows):
    return take(batch([*unbatch(fork(take(state, rows), 2)), state]), rows)

  forked = shuffle(got, jnp.array([2, 0]))
  # take gives rows 2 and 0; forked 2 2 0 0; then 0 1 2, of which 2 and 0.
  assert_equal(forked, batch([row(got, 0), row(got, 2)]))


def test_traced_rows_outside_never_touch_another_row():
  state = random_state(make_config("S"), 2)
  new = random_state(make_config("S"), 1, seed=1)
  for index in (-1, 2):
    assert_equal(jax.jit(put)(state, jnp.int32(index), new), state)
    missing = jax.jit(take)(state, jnp.array([index]))
    assert missing.position.tolist() == [-1]
    assert all(
      jnp.isnan(x).all()
      for x in jax.tree.leaves(missing)
      if jnp.issubdtype(x.dtype, jnp.floating)
    )


def test_wrong_rows_and_other_models_are_refused():
  config = make_config("GS")
  other = dataclasses.replace(config, norm_eps=1e-6)
  state = init_state(config, 2)
  refusals = [
    (lambda: fork(state, 0), "n: expected >= 1, got 0"),
    (lambda: batch([]), "states: expected at least one"),
    (
      lambda: batch([state, init_state(other, 1)]),
      r"states\[1\]: a state of another model",
    ),
    (lambda: put(state, 0, init_state(other, 1)), "other: a state of another"),
    (lambda: take(state, []), "rows: expected at least one index"),
    (lambda: take(state, [0, 2]), r"rows: expected indices in \[0, 2\)"),
    (lambda: take(state, [-1]), r"rows: expected indices in \[0, 2\)"),
    (lambda: take(state, [0.0]), "rows: expected integers, got float64"),
    (lambda: put(state, 2, init_state(config, 1)), "rows: expected indices"),
    (lambda: put(state, [0], state), "rows: expected 2 indices"),
    (lambda: put(state, [1, 1], state), "rows: expected different rows"),
  ]
  for refused, message in refusals:
    with pytest.raises(ValueError, match=message):
      refused()
