"""Continuous batching: each request gets the tokens it gets alone."""

import jax
import numpy as np
import pytest

from gdn2_jax.inference.batching import Batcher
from gdn2_jax.inference.checks import NonFiniteError
from gdn2_jax.inference.generate import generate
from gdn2_jax.inference.request import Reading, Request
from gdn2_jax.inference.sampling import GREEDY, Sampler
from gdn2_jax.inference.state import init_state
from tests.inference.conftest import damage_params, damage_state, make_tiny

WARM = Sampler(temperature=1.3, top_k=30, top_p=0.98)
HOT = Sampler(temperature=2.0)
# Prompt, new tokens, seed, sampler.
ASKED = [
  ([3, 1, 4, 1, 5, 9, 2, 6, 5, 3], 9, 0, WARM),
  ([7], 3, 1, GREEDY),
  ([8, 8], 14, 2, HOT),
  ([2, 7, 1], 1, 3, WARM),
  ([5] * 16, 6, 4, Sampler(temperature=0.9, top_p=0.6)),
  ([8, 8], 14, 2, HOT),
]


@pytest.fixture(scope="module")
def hybrid():
  return make_tiny("GS")


def batcher(tiny):
  return Batcher(tiny.params, tiny.config, 2, tokens_per_dispatch=5)


def submit(batch, i, **changes):
  prompt, count, seed, sampler = ASKED[i]
  return batch.submit(
    prompt, count, rng=jax.random.key(seed), sampler=sampler, **changes
  )


@pytest.fixture(scope="module")
def alone(hybrid):
  """Tokens of each request without any other."""
  tokens = []
  for i in range(len(ASKED)):
    batch = batcher(hybrid)
    completion = submit(batch, i)
    batch.run()
    tokens.append(completion.tokens)
  return tokens


@pytest.mark.parametrize("i", [0, 1])
def test_alone_a_request_gets_what_generate_gives(hybrid, alone, i):
  """One compiles its sampler, the other takes it as numbers."""
  prompt, count, seed, sampler = ASKED[i]
  options = {"rng": jax.random.key(seed), "sampler": sampler}
  want = generate(hybrid.params, hybrid.config, [prompt], count, **options)
  assert [alone[i]] == want


def test_requests_get_the_tokens_they_get_alone(hybrid, alone):
  """Six in two slots, some of them submitted while others decode."""
  batch = batcher(hybrid)
  assert not batch.step()
  done = [submit(batch, i) for i in range(3)]
  assert (batch.active, batch.waiting) == (0, 3)
  assert batch.step()
  assert (batch.active, batch.waiting) == (2, 1)
  done += [submit(batch, i) for i in range(3, 6)]
  batch.run()
  assert (batch.active, batch.waiting) == (0, 0)
  assert [completion.tokens for completion in done] == alone
  assert all(completion.done for completion in done)


def test_tokens_are_streamed_and_requests_may_stop(hybrid, alone):
  """By a stop id, by a callback, by `cancel`; the others are not affected."""
  batch = batcher(hybrid)
  calls = []
  first = submit(batch, 0, on_tokens=calls.append)
  stop = alone[2][6]
  stopped = submit(batch, 2, stop_ids=[stop])
  called = submit(batch, 4, on_tokens=lambda ids: True)
  never = submit(batch, 5)
  never.cancel()
  batch.run()
  assert calls[0] == alone[0][:1] and len(calls) >= 3
  assert [token for ids in calls for token in ids] == first.tokens == alone[0]
  assert stopped.tokens == alone[2][: alone[2].index(stop)]
  assert called.tokens == alone[4][: len(called.tokens)] and called.done
  assert 1 <= len(called.tokens) <= 5
  assert never.done and never.tokens == []


def test_a_completion_goes_on_from_its_state(hybrid, alone):
  """The state has read the prompt and all tokens but the last."""
  batch = batcher(hybrid)
  prompt, count, seed, sampler = ASKED[0]
  rng = jax.random.key(seed)
  options = {"rng": rng, "sampler": sampler, "keep_state": True}
  part = batch.submit(prompt, 4, **options)
  other = submit(batch, 2)
  batch.run()
  assert part.state.position == len(prompt) + 3
  rest = batch.submit(
    [part.pending], count - 4, state=part.state, index=part.index, **options
  )
  batch.run()
  assert part.tokens + rest.tokens == alone[0] and rest.index == count
  assert other.tokens == alone[2] and other.state is None


def test_a_callback_that_raises_loses_nothing(hybrid, alone):
  batch = batcher(hybrid)

  def angry(ids):
    raise RuntimeError("no")

  first = submit(batch, 1, on_tokens=angry)
  second = submit(batch, 2)
  with pytest.raises(RuntimeError, match="no"):
    batch.step()
  first.on_tokens = None
  batch.run()
  assert (first.tokens, second.tokens) == (alone[1], alone[2])


def test_a_damaged_session_ends_alone(hybrid, alone):
  """With an error of its own; its slot is free for the next."""
  batch = batcher(hybrid)
  state = damage_state(init_state(hybrid.config, 1), 0)
  calls = []
  bad = submit(batch, 0, state=state, keep_state=True, on_tokens=calls.append)
  others = [submit(batch, i) for i in range(1, 6)]
  batch.run()
  assert isinstance(bad.error, NonFiniteError) and bad.done
  assert "at index 0 of the chosen tokens: state: NaN" in str(bad.error)
  assert bad.tokens == calls == [] and bad.state is None
  assert [completion.tokens for completion in others] == alone[1:]
  assert all(completion.error is None for completion in others)
  assert (batch.active, batch.waiting) == (0, 0)


def test_a_request_keeps_what_it_got_before_nan(hybrid, alone):
  """At a token whose embedding is NaN; a request that ends there is whole."""
  token = alone[2][6]
  assert token not in ASKED[2][0] + alone[2][:6]
  params = damage_params(hybrid.params, "embedding/table", token)
  batch = Batcher(params, hybrid.config, 2, tokens_per_dispatch=5)
  cut, whole = submit(batch, 2), submit(batch, 2, stop_ids=[token])
  batch.run()
  assert cut.tokens == alone[2][:7] and cut.done
  assert str(cut.error).startswith(
    "prompts[0]: non-finite logits at index 7 of"
  )
  assert whole.tokens == alone[2][:6] and whole.error is None


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"prompt": []}, r"prompts\[0\]: expected at least one"),
    ({"prompt": [61]}, r"prompts\[0\].*\[0, 61\)"),
    ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"sampler": Sampler(top_k=62)}, "top_k"),
    ({"stop_ids": [-1]}, "stop_ids"),
    ({"rng": jax.random.key(0, impl="rbg")}, "rng: expected a key of"),
  ],
)
def test_bad_requests_are_refused_when_submitted(attention, change, message):
  batch = batcher(attention)
  request = {"prompt": [1], "max_new_tokens": 2, "rng": jax.random.key(0)}
  with pytest.raises(ValueError, match=message):
    batch.submit(**(request | change))
  assert batch.waiting == 0


def test_states_of_others_are_refused_when_submitted(attention, hybrid):
  ask = {"max_new_tokens": 2, "rng": jax.random.key(0)}
  batch = batcher(attention)
  with pytest.raises(
    ValueError, match=r"state: expected .* batch size 1, got 2"
  ):
    batch.submit([1], state=init_state(attention.config, 2), **ask)
  with pytest.raises(ValueError, match="state: a state of another model"):
    batch.submit([1], state=init_state(hybrid.config, 1), **ask)


def test_full_attention_needs_room_and_keeps_to_it():
  tiny = make_tiny("A")
  with pytest.raises(ValueError, match="max_length"):
    batcher(tiny)
  batch = Batcher(tiny.params, tiny.config, 2, max_length=16)
  ask = {"max_new_tokens": 8, "rng": jax.random.key(0)}
  with pytest.raises(ValueError, match=r"room for max_length=16 .* got 17"):
    batch.submit([1] * 9, **ask)
  with pytest.raises(ValueError, match=r"max_length=16, .* got 32"):
    batch.submit([1], state=init_state(tiny.config, 1, 32), **ask)
  assert batch.waiting == 0


def test_a_request_that_cannot_begin_ends(attention):
  """Its state was donated while it waited; the slots stay free."""
  batch = batcher(attention)
  state = init_state(attention.config, 1)
  lost = batch.submit([1], 2, rng=jax.random.key(0), state=state)
  jax.tree.map(lambda leaf: leaf.delete(), state)
  with pytest.raises(ValueError, match="state: was donated"):
    batch.step()
  assert lost.done and lost.tokens == []
  assert "state: was donated" in str(lost.error)
  assert (batch.active, batch.waiting) == (0, 0)


LONG = [(7 * i + 3) % 61 for i in range(90)]


def test_a_long_prompt_is_read_between_the_steps_of_others(hybrid, alone):
  """In pieces of 20, of which each step reads one; no other request waits."""
  batch = Batcher(
    hybrid.params, hybrid.config, 3, tokens_per_dispatch=2, prefill_piece=20
  )
  first = submit(batch, 0)
  batch.step()
  long = batch.submit(LONG, 4, rng=jax.random.key(9), sampler=GREEDY)
  counts = []
  while not long.tokens:
    batch.step()
    counts.append(len(first.tokens))
    if len(counts) == 1:
      short = submit(batch, 1)  # its prompt takes its turn
  assert len(counts) == 5  # pieces: 20 * 4, with one token of `short`, and 9
  assert counts[:4] == [3, 5, 6, 8]  # a first token comes alone
  assert short.done
  batch.run()
  assert (first.tokens, short.tokens) == (alone[0], alone[1])
  want = generate(
    hybrid.params,
    hybrid.config,
    [LONG],
    4,
    rng=jax.random.key(9),
    sampler=GREEDY,
  )
  assert [long.tokens] == want


def test_pieces_give_the_state_of_one_prefill(hybrid):
  """Every bit with the default piece, else up to rounding."""

  def request():
    one = jax.random.key(0)
    return Request(
      hybrid.config, [LONG], 1, one, GREEDY, (), state=None, index=0
    )

  want, _ = request().begin(hybrid.params)
  for piece, tolerance in ((20, 1e-5), (512, 0.0)):
    reading, sizes = Reading(request(), piece), []
    while reading.left:
      sizes.append(reading.advance(hybrid.params))
    assert sizes == ([20] * 4 + [9] if piece == 20 else [89])
    state, rows = reading.end()
    assert state.position.tolist() == [89] and rows.token.tolist() == LONG[-1:]
    for x, y in zip(
      jax.tree.leaves(state.cache), jax.tree.leaves(want.cache), strict=True
    ):
      assert np.abs(x - y).max() <= tolerance


def test_a_prompt_may_be_cancelled_while_it_is_read(hybrid, alone):
  batch = Batcher(hybrid.params, hybrid.config, 1, prefill_piece=20)
  long = batch.submit(LONG, 4, rng=jax.random.key(9), keep_state=True)
  waits, gone = submit(batch, 1), submit(batch, 2)
  gone.cancel()
  batch.step()
  assert (batch.active, batch.waiting) == (1, 1)
  assert gone.done and long.begun is not None and waits.begun is None
  long.cancel()
  batch.run()
  assert long.done and long.tokens == [] and long.state is None
  assert waits.tokens == alone[1] and (batch.active, batch.waiting) == (0, 0)


def test_the_piece_is_a_count(attention):
  with pytest.raises(ValueError, match="prefill_piece: expected >= 1, got 0"):
    Batcher(attention.params, attention.config, 2, prefill_piece=0)
