"""Prefill and decode against the full forward pass."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.inference import state as state_lib
from gdn2_jax.inference.state import decode_step, init_state, prefill
from tests.numerics import rel_rms

# Two float32 programs for the same logits: measured at most 5.2e-7 relative RMS
# over the three models here. The contract for logits is 1e-4.
TOLERANCE = 2 * 6e-7


def assert_close(got, want):
  assert rel_rms(got, want) <= TOLERANCE


def snapshot(tree):
  return jax.tree.map(np.array, tree)


def test_prefill_and_decode_equal_the_full_forward(tiny):
  """Ragged prompts, some longer than the window, then token by token."""
  lengths = np.array([13, 6, 1], np.int32)
  state = init_state(tiny.config, 3)
  # What lies beyond a row's length must not be read.
  tokens = tiny.tokens[:, :13].copy()
  tokens[np.arange(13)[None] >= lengths[:, None]] = -7
  logits, state = prefill(tiny.params, tokens, lengths, state)
  rows = np.arange(3)
  assert logits.dtype == jnp.float32
  for n in range(11):
    assert_close(logits, tiny.logits[rows, lengths - 1 + n])
    np.testing.assert_array_equal(state.position, lengths + n)
    token = jnp.asarray(tiny.tokens[rows, lengths + n])
    logits, state = decode_step(tiny.params, token, state)
  assert_close(logits, tiny.logits[rows, lengths + 10])


def test_ragged_batch_equals_each_prompt_alone(tiny):
  lengths = np.array([13, 6, 1], np.int32)
  logits, state = prefill(
    tiny.params,
    tiny.tokens[:, :13],
    lengths,
    init_state(tiny.config, 3),
  )
  for i, n in enumerate(lengths):
    alone_logits, alone = prefill(
      tiny.params,
      np.pad(tiny.tokens[i : i + 1, :n], ((0, 0), (0, 13 - n))),
      lengths[i : i + 1],
      init_state(tiny.config, 1),
    )
    assert_close(logits[i], alone_logits[0])
    for got, want in zip(
      jax.tree.leaves(state.cache), jax.tree.leaves(alone.cache), strict=True
    ):
      assert_close(np.asarray(got)[:, i] + 1.0, np.asarray(want)[:, 0] + 1.0)


def test_chunked_prefill_equals_one_shot(tiny):
  lengths = np.array([16, 10, 3], np.int32)
  config, params, tokens = tiny.config, tiny.params, tiny.tokens[:, :16]
  whole, whole_state = prefill(params, tokens, lengths, init_state(config, 3))
  # Chunks of 8: a row ends in the first, in the second, and at its end.
  parts, parts_state = prefill(
    params, tokens, lengths, init_state(config, 3), chunk_size=8
  )
  assert_close(parts, whole)
  np.testing.assert_array_equal(parts_state.position, lengths)
  for a, b in zip(
    jax.tree.leaves(parts_state), jax.tree.leaves(whole_state), strict=True
  ):
    assert_close(np.asarray(a) + 1.0, np.asarray(b) + 1.0)


def test_prefill_continues_a_state(hybrid):
  full = np.array([8, 8, 8], np.int32)
  state = init_state(hybrid.config, 3)
  for start in (0, 8, 16):
    piece = hybrid.tokens[:, start : start + 8]
    logits, state = prefill(hybrid.params, piece, full, state, chunk_size=8)
    assert_close(logits, hybrid.logits[:, start + 7])


def test_a_finished_row_is_not_touched_by_later_chunks(hybrid):
  """Bit for bit: padding neither reads nor changes a state."""
  config, params = hybrid.config, hybrid.params
  lengths = np.array([8, 8, 8], np.int32)
  _, short = prefill(
    params,
    hybrid.tokens[:, :8],
    lengths,
    init_state(config, 3),
    chunk_size=8,
  )
  lengths = np.array([24, 8, 8], np.int32)
  _, long = prefill(
    params,
    hybrid.tokens,
    lengths,
    init_state(config, 3),
    chunk_size=8,
  )
  for a, b in zip(
    jax.tree.leaves(short.cache), jax.tree.leaves(long.cache), strict=True
  ):
    np.testing.assert_array_equal(a[:, 1:], b[:, 1:])
    assert not np.array_equal(a[:, 0], b[:, 0])


def test_prefill_and_decode_reuse_the_buffers_of_their_state(hybrid):
  def decode(state):
    return decode_step(hybrid.params, jnp.array([5]), state)

  def read(state):
    tokens, lengths = np.ones((1, 8), np.int32), np.array([8], np.int32)
    return prefill(hybrid.params, tokens, lengths, state, chunk_size=8)

  def shapes(tree):
    return jax.tree.map(lambda a: (a.shape, a.dtype), tree)

  for step in (decode, read):
    state = init_state(hybrid.config, 1)
    _, new = step(state)
    # Not the positions: a buffer that the host has looked at may stay.
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.cache))
    assert shapes(state) == shapes(new)
    for again in (decode, read):
      with pytest.raises(ValueError, match="state: was donated"):
        again(state)


def test_a_state_keeps_its_config(attention):
  """Changes of the config it was made from do not reach it."""
  config = copy.deepcopy(attention.config)
  state = init_state(config, 1)
  config.vocab_size = 7
  assert state.config == attention.config
  with pytest.raises(dataclasses.FrozenInstanceError):
    state.config = config


def test_states_of_another_model_or_batch_size_are_refused(attention, hybrid):
  token, lengths = np.array([5]), np.array([1], np.int32)
  state = init_state(attention.config, 1)
  other = dict(attention.params, head=attention.params["head"][:, 1:])
  for params, message in (
    (other, r"params: head has shape \(32, 60\).*has shape \(32, 61\)"),
    (hybrid.params, r"params: groups/layer_0/mixer.*is missing"),
  ):
    with pytest.raises(ValueError, match=message):
      decode_step(params, token, state)
    with pytest.raises(ValueError, match=message):
      prefill(params, token[None], lengths, state)
  with pytest.raises(
    ValueError, match=r"token: expected shape \(1,\).*got \(2,\)"
  ):
    decode_step(attention.params, np.array([5, 5]), state)


def test_few_programs_serve_many_prompt_lengths(attention):
  before = state_lib._read_chunk._cache_size()
  tokens = np.tile(attention.tokens, (1, 4))
  for n in (1, 2, 9, 15, 16, 17, 24, 31, 32):
    lengths = np.array([n, n, 1], np.int32)
    state = init_state(attention.config, 3)
    prefill(attention.params, tokens[:, :n], lengths, state)
  # Fewer than the two buckets where another test has compiled one.
  assert state_lib._read_chunk._cache_size() - before <= 2


@pytest.mark.parametrize(
  ("size", "largest", "want"),
  [(1, 512, 16), (16, 512, 16), (17, 512, 32), (400, 512, 512), (5, 7, 7)],
)
def test_buckets(size, largest, want):
  assert state_lib.bucket(size, largest) == want


def test_prefill_works_inside_jit(attention):
  lengths = np.array([13, 6, 1], np.int32)

  @jax.jit
  def last_logits(params, tokens, lengths):
    state = init_state(attention.config, 3)
    return prefill(params, tokens, lengths, state)[0]

  logits = last_logits(attention.params, attention.tokens[:, :13], lengths)
  assert_close(logits, attention.logits[np.arange(3), lengths - 1])


def test_a_bad_chunk_size_is_refused(attention):
  tokens, lengths = attention.tokens, np.array([4, 4, 1], np.int32)
  state = init_state(attention.config, 3)
  with pytest.raises(ValueError, match="chunk_size: expected >= 1, got 0"):
    prefill(attention.params, tokens, lengths, state, chunk_size=0)
