"""Splits, blocks and buckets: equal results, few programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.inference.checks import NonFiniteError
from gdn2_jax.inference.generate import generate
from gdn2_jax.inference.rows import fork
from gdn2_jax.inference.sampling import GREEDY
from gdn2_jax.inference.state import (
  decode_step,
  extend,
  init_state,
  prefill,
)
from tests.inference.conftest import (
  LENGTH,
  damage_params,
  damage_state,
  make_tiny,
)
from tests.inference.states import make_model
from tests.inference.test_state import assert_close

FULL = np.array([LENGTH] * 3, np.int32)


@pytest.mark.parametrize("pattern", ["S", "GS"])
def test_any_split_of_the_prompts_reads_the_same(rng, pattern):
  """Each row is cut at places of its own: a(1) + a(2) + ... in place of a."""
  tiny = make_tiny(pattern)
  whole = prefill(
    tiny.params, tiny.tokens, FULL, init_state(tiny.config, 3), chunk_size=8
  )
  for _ in range(4):
    state = init_state(tiny.config, 3)
    cut = np.zeros((3,), np.int32)
    while (cut < LENGTH).all():
      # Ragged pieces; all rows end together, in the last.
      last = cut.max() > LENGTH - 9
      length = FULL - cut if last else rng.integers(1, 10, 3, dtype=np.int32)
      piece = np.zeros((3, length.max()), np.int32)
      for row in range(3):
        piece[row, : length[row]] = tiny.tokens[row, cut[row] :][: length[row]]
      logits, state = prefill(tiny.params, piece, length, state, chunk_size=8)
      cut += length
    parts = logits, state
    for got, want in zip(
      jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True
    ):
      assert_close(np.asarray(got) + 1.0, np.asarray(want) + 1.0)


def test_extend_gives_the_logits_after_every_token(hybrid):
  """For a ragged block, inside jit; a fork reads what is not kept."""
  params, tokens = hybrid.params, hybrid.tokens
  lengths = np.array([8, 3, 5], np.int32)
  _, state = prefill(
    params, tokens[:, :8], lengths, init_state(hybrid.config, 3)
  )
  rows = np.arange(3)[:, None]
  block = tokens[rows, lengths[:, None] + np.arange(6)]
  blocks = jax.jit(extend)
  logits, _ = blocks(params, block, np.full((3,), 6), fork(state, 1))
  after = lengths[:, None] + np.arange(6)
  assert_close(logits, hybrid.logits[rows, after])

  keep = np.array([2, 6, 1])
  logits, state = blocks(params, block, keep, state)
  for row, n in enumerate(keep):
    assert_close(logits[row, :n], hybrid.logits[row, after[row, :n]])
  np.testing.assert_array_equal(state.position, lengths + keep)
  lengths = lengths + keep
  logits, _ = decode_step(params, tokens[np.arange(3), lengths], state)
  assert_close(logits, hybrid.logits[np.arange(3), lengths])


@pytest.mark.slow
def test_extend_names_the_row_and_the_token_of_nan():
  """Outside of jit; NaN beyond `lengths` is no failure."""
  tiny = make_model("G")  # token by token: NaN stays out of earlier ones
  params, blocks = tiny.params, np.array([[5, 6, 7, 0], [8, 9, 4, 3]])
  start, lengths = np.array([3, 2], np.int32), np.array([3, 4], np.int32)
  _, state = prefill(params, blocks[:, :3], start, init_state(tiny.config, 2))
  norm = damage_params(params, "final_norm/weight")
  word = damage_params(params, "embedding/table", 4)
  padding = damage_params(params, "embedding/table", 0)

  for given, damaged, rows, token, cause in (
    (norm, False, [0, 1], 0, r"final_norm/weight; .* \(rows at fault: 2\)"),
    (word, False, [1], 2, "embedding/table"),
    (params, True, [1], 0, "state: NaN or infinity in this row"),
  ):
    row = rows[0]
    message = (
      rf"^tokens\[{row}\]: non-finite logits after token {token} of the block, "
      f"at position {start[row] + token}: .*{cause}"
    )
    begin = fork(state, 1)
    begin = damage_state(begin, 1) if damaged else begin
    with pytest.raises(NonFiniteError, match=message) as raised:
      extend(given, blocks, lengths, begin)
    assert raised.value.rows == rows

  logits, _ = extend(padding, blocks, lengths, fork(state, 1))
  assert np.isfinite(logits[0, :3]).all() and np.isnan(logits[0, 3]).all()
  logits, _ = jax.jit(extend)(word, blocks, lengths, state)
  assert np.isnan(logits[1, 2:]).all() and np.isfinite(logits[1, :2]).all()


@pytest.mark.slow
def test_the_number_of_programs_is_bounded(attention):
  """Many lengths of prompts and outputs compile nothing after a few."""
  compiled = []

  def listen(event, _, **kwargs):
    if event == "/jax/core/compile/backend_compile_duration":
      compiled.append(kwargs.get("fun_name"))

  def run(prompt, count):
    prompts = [[5] * prompt, [7] * min(prompt, 3)]
    args = (attention.params, attention.config, prompts, count)
    generate(*args, rng=jax.random.key(0), sampler=GREEDY)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    for prompt in (2, 18):  # the buckets of 16 and 32
      run(prompt, 2)
    assert compiled
    compiled.clear()
    for prompt in (1, 3, 9, 16, 17, 19, 23, 30, 33):
      run(prompt, prompt + 2)
    assert compiled == []
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def test_positions_end_where_int32_does(hybrid):
  end = 2**31 - 1
  state = init_state(hybrid.config, 3)
  state = state.replace(position=jnp.array([end - 1, 5, end]))
  two = np.array([2, 2, 1], np.int32)
  for read in (prefill, extend):
    with pytest.raises(ValueError, match=f"max_length={end}.*got {end + 1}"):
      read(hybrid.params, hybrid.tokens[:, :2], two, fork(state, 1))
  with pytest.raises(ValueError, match=f"max_length={end}"):
    generate(
      hybrid.params,
      hybrid.config,
      [[1]] * 3,
      1,
      rng=jax.random.key(0),
      state=fork(state, 1),
    )
  # On the device nothing can be raised: there it is NaN, of this row alone.
  logits, _ = decode_step(hybrid.params, np.array([1, 2, 3]), state)
  np.testing.assert_array_equal(
    np.isnan(logits).all(axis=1), [False, False, True]
  )
  assert np.isfinite(logits[:2]).all()


def test_full_attention_has_room_for_what_was_asked():
  tiny = make_tiny("A")
  with pytest.raises(ValueError, match="max_length=None: expected >= 1"):
    init_state(tiny.config, 3)
  state = init_state(tiny.config, 3, max_length=LENGTH - 1)
  assert state.max_length == LENGTH - 1
  assert init_state(make_tiny("S").config, 1, max_length=3).max_length is None
  message = f"max_length={LENGTH - 1} .*got {LENGTH}"
  with pytest.raises(ValueError, match=message):
    prefill(tiny.params, tiny.tokens, FULL, state)
  with pytest.raises(ValueError, match=message):
    generate(
      tiny.params,
      tiny.config,
      tiny.tokens[:, :4].tolist(),
      LENGTH - 4,
      rng=jax.random.key(0),
      state=state,
    )


@pytest.mark.parametrize("read", [prefill, extend])
@pytest.mark.parametrize(
  ("tokens", "lengths", "message"),
  [
    (np.zeros((2, 4), np.int32), [4, 4], r"tokens.*B=3"),
    (np.zeros((3, 0), np.int32), [1, 1, 1], r"tokens.*T >= 1"),
    (np.zeros((12,), np.int32), [4, 4, 4], r"tokens.*\[B=3, T >= 1\]"),
    (np.zeros((3, 4), np.float32), [4, 4, 1], r"tokens.*integers.*float32"),
    (np.zeros((3, 4), bool), [4, 4, 1], r"tokens.*integers.*bool"),
    (np.full((3, 4), 61, np.int32), [4, 4, 1], r"tokens.*\[0, 61\).*61"),
    (np.full((3, 4), -1, np.int64), [4, 4, 1], r"tokens.*\[0, 61\).*-1"),
    (np.zeros((3, 4), np.int32), [4, 4], r"lengths.*\(3,\)"),
    (np.zeros((3, 4), np.int32), [4, 0, 1], r"lengths.*1 to T=4"),
    (np.zeros((3, 4), np.int32), [4, 5, 1], r"lengths.*1 to T=4"),
    (np.zeros((3, 4), np.int32), [4.0, 4, 1], r"lengths.*integers.*float64"),
  ],
)
def test_bad_blocks_are_refused(attention, read, tokens, lengths, message):
  state = init_state(attention.config, 3)
  with pytest.raises(ValueError, match=message):
    read(attention.params, tokens, np.array(lengths), state)
  assert not state.position.is_deleted()


@pytest.mark.parametrize(
  ("token", "message"),
  [
    (np.array([1, 2]), r"token: expected shape \(3,\).*\(2,\)"),
    (np.array([[1], [2], [3]]), r"token: expected shape \(3,\)"),
    (np.array([1.0, 2.0, 3.0]), "token: expected integers.*float64"),
    (np.array([1, 61, 2]), r"token: expected ids in \[0, 61\), got 61"),
  ],
)
def test_bad_tokens_are_refused(attention, token, message):
  with pytest.raises(ValueError, match=message):
    decode_step(attention.params, token, init_state(attention.config, 3))
