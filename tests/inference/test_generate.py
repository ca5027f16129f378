"""Generation: tokens, ends, memory, failures."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.inference.checks import NonFiniteError, is_usable
from gdn2_jax.inference.decode import decode_block, for_loop
from gdn2_jax.inference.generate import generate, stream
from gdn2_jax.inference.request import Request
from gdn2_jax.inference.rows import take
from gdn2_jax.inference.sampling import GREEDY, Sampler
from gdn2_jax.inference.state import init_state
from tests.inference.conftest import damage_params, damage_state

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [7], [8, 8]]
NEW = 14  # 10 + 14 = 24 tokens, the length the full forward is compiled for
KEY = jax.random.key(0)
WARM = Sampler(temperature=1.3, top_k=30, top_p=0.98)


@functools.cache
def argmax_chain(tiny):
  """Each prompt continued by the argmax of a full forward pass per token."""
  tokens = np.zeros(tiny.tokens.shape, np.int32)
  for row, prompt in zip(tokens, PROMPTS, strict=True):
    row[: len(prompt)] = prompt
  lengths = np.array([len(p) for p in PROMPTS])
  rows = np.arange(len(PROMPTS))
  for n in range(NEW):
    logits = tiny.forward(tiny.params, tokens)  # causal: the tail is ignored
    tokens[rows, lengths + n] = np.argmax(
      np.asarray(logits)[rows, lengths + n - 1], axis=-1
    )
  return [
    row[n : n + NEW].tolist() for row, n in zip(tokens, lengths, strict=True)
  ]


def test_greedy_is_the_argmax_of_the_full_forward(tiny):
  got = generate(
    tiny.params, tiny.config, PROMPTS, NEW, rng=KEY, sampler=GREEDY
  )
  assert got == argmax_chain(tiny)


def test_sampling_repeats_with_the_seed_and_differs_without(hybrid):
  run = functools.partial(
    generate, hybrid.params, hybrid.config, PROMPTS, NEW, sampler=WARM
  )
  first = run(rng=jax.random.key(5))
  assert first == run(rng=jax.random.key(5))
  assert first != run(rng=jax.random.key(6))
  assert [len(row) for row in first] == [NEW] * 3


def test_equal_prompts_in_a_batch_draw_differently(hybrid):
  rows = generate(
    hybrid.params, hybrid.config, [[9, 9]] * 3, NEW, rng=KEY, sampler=WARM
  )
  assert rows[0] != rows[1] != rows[2]


def test_stream_gives_the_tokens_of_generate(hybrid):
  args = (hybrid.params, hybrid.config)
  want = generate(*args, PROMPTS, NEW, rng=KEY, sampler=WARM)[0]
  run = functools.partial(
    stream, *args, PROMPTS[0], rng=KEY, sampler=WARM, tokens_per_dispatch=5
  )
  assert list(run(NEW)) == want
  assert list(run(6)) == want[:6]
  assert list(run(1)) == want[:1]
  for stop in (want[0], want[7], want[NEW - 1]):
    assert list(run(NEW, stop_ids=[stop])) == want[: want.index(stop)]


def test_stop_ids_end_each_row_where_it_meets_one(hybrid):
  args = (hybrid.params, hybrid.config, PROMPTS, NEW)
  free = generate(*args, rng=KEY, sampler=WARM)
  # One stop in the middle of row 0, and the very first token of row 1.
  stops = [free[0][5], free[1][0]]

  def until_stop(row):
    met = [i for i, token in enumerate(row) if token in stops]
    return row[: met[0]] if met else row

  want = [until_stop(row) for row in free]
  assert want[1] == [] and len(want[0]) <= 5
  assert generate(*args, rng=KEY, sampler=WARM, stop_ids=stops) == want


def begin(tiny, stop_ids=()):
  """State and rows of PROMPTS, as `generate` begins them."""
  request = Request(tiny.config, PROMPTS, NEW, KEY, WARM, stop_ids, None, 0)
  return request.begin(tiny.params)


def test_decoding_ends_when_every_row_is_done(hybrid):
  """Rows that are done do not run on to the end of the block."""
  free = generate(
    hybrid.params, hybrid.config, PROMPTS, NEW, rng=KEY, sampler=WARM
  )
  state, rows = begin(hybrid, [row[3] for row in free])
  _, state, rows = decode_block(
    hybrid.params, state, rows, np.int32(16), np.bool_(False), size=16
  )
  assert rows.done.all() and rows.index.max() <= 4
  # Tokens read by every row, done or not: its prompt's and one per round.
  rounds = np.asarray(state.position) - [len(p) - 1 for p in PROMPTS]
  np.testing.assert_array_equal(rounds, [rows.index.max()] * 3)


def test_parameters_leave_their_stacks_once_per_call(hybrid, monkeypatch):
  copies = []

  def count(params, config):
    copies.append(for_loop(params, config))
    return copies[-1]

  # The package's attribute of this name is the function.
  module = importlib.import_module("gdn2_jax.inference.generate")
  monkeypatch.setattr(module, "for_loop", count)
  arguments = hybrid.params, hybrid.config, PROMPTS, 5
  tokens = generate(*arguments, rng=KEY, tokens_per_dispatch=2)
  [params] = copies
  assert "groups" not in params and "group_0" in params
  assert tokens == generate(*arguments, rng=KEY)


def test_a_loop_over_groups_reads_the_stacks(hybrid):
  layers = 2 * hybrid.config.num_layers
  config = dataclasses.replace(hybrid.config, num_layers=layers)
  params = {"groups": None}
  assert for_loop(params, config) is params


def test_memory_does_not_grow_with_the_number_of_tokens(hybrid):
  """Beside the output: compiled temporaries for 16 and for 65536 tokens."""
  state, rows = begin(hybrid)

  def compiled(size):
    lowered = decode_block.lower(
      hybrid.params, state, rows, np.int32(3), np.bool_(False), size=size
    )
    return lowered.compile().memory_analysis()

  small, large = compiled(16), compiled(65536)
  buffer = 3 * 65536 * 4
  assert large.output_size_in_bytes - small.output_size_in_bytes <= buffer
  # The loop may hold one copy of the buffer, and nothing else of that size.
  grown = large.temp_size_in_bytes - small.temp_size_in_bytes
  assert grown <= buffer, grown


@pytest.mark.parametrize("sampler", [GREEDY, WARM])
def test_going_on_from_the_returned_state_changes_nothing(hybrid, sampler):
  """In two parts, rows ending at different tokens, bit for bit."""
  run = functools.partial(
    generate, hybrid.params, hybrid.config, rng=KEY, sampler=sampler
  )
  at_once = run(PROMPTS, NEW, return_state=True)
  whole = at_once.tokens
  stop = next(i for i in whole[0][2:8] if i not in whole[1][:8] + whole[2][:8])
  first = run(PROMPTS, 8, stop_ids=[stop], return_state=True)
  index = np.array([whole[0].index(stop) + 1, 8, 8])
  assert first.index == index.tolist() and index[0] < 8
  assert first.tokens == [whole[0][: index[0] - 1], *(r[:8] for r in whole[1:])]
  assert first.pending == [stop, whole[1][7], whole[2][7]]
  read_tokens = index + [len(p) - 1 for p in PROMPTS]
  np.testing.assert_array_equal(first.state.position, read_tokens)
  more = run(
    [[token] for token in first.pending],
    6,
    state=first.state,
    index=first.index,
    return_state=True,
  )
  want = [row[n : n + 6] for row, n in zip(whole, index, strict=True)]
  assert more.tokens == want
  np.testing.assert_array_equal(more.state.position, read_tokens + 6)
  assert more.index == (index + 6).tolist()
  jax.tree.map(
    np.testing.assert_array_equal,
    take(more.state, [1, 2]),
    take(at_once.state, [1, 2]),
  )


def test_callbacks_get_the_tokens_and_may_end_a_row(hybrid):
  args = (hybrid.params, hybrid.config, PROMPTS, NEW)
  run = functools.partial(generate, *args, rng=KEY, sampler=WARM)
  want = run()
  calls = []

  def on_tokens(row, ids):
    calls.append((row, ids))
    return row == 1 and len(calls) > 3

  got = run(on_tokens=on_tokens, tokens_per_dispatch=5)
  assert [len(ids) for row, ids in calls if row == 0] == [1, 5, 5, 3]
  assert [len(ids) for row, ids in calls if row == 1] == [1, 5]
  for row in range(3):
    assert [t for i, ids in calls if i == row for t in ids] == got[row]
  assert got == [want[0], want[1][:6], want[2]]


@pytest.mark.parametrize(
  "sampler", [pytest.param(GREEDY, marks=pytest.mark.deep), WARM]
)
def test_weights_with_nan_end_no_row_in_silence(hybrid, sampler):
  params = damage_params(hybrid.params, "final_norm/weight", 3)
  args = (params, hybrid.config)
  message = (
    r"^prompts\[0\]: non-finite logits at index 0 of the chosen tokens: "
    r"params: NaN or infinity in final_norm/weight; .*\(rows at fault: 3\)$"
  )
  with pytest.raises(NonFiniteError, match=message) as raised:
    generate(*args, PROMPTS, NEW, rng=KEY, sampler=sampler)
  assert raised.value.rows == [0, 1, 2]
  assert raised.value.tokens == [[], [], []]
  with pytest.raises(NonFiniteError, match=message.split(r" .*\(")[0]):
    next(stream(*args, PROMPTS[0], NEW, rng=KEY, sampler=sampler))


@pytest.mark.parametrize("return_state", [False, True])
def test_a_damaged_state_is_named_and_the_other_rows_end(hybrid, return_state):
  """From an empty state, and from a returned one."""
  run = functools.partial(
    generate,
    hybrid.params,
    hybrid.config,
    rng=KEY,
    sampler=WARM,
    return_state=return_state,
  )
  want = generate(*run.args, PROMPTS, NEW, rng=KEY, sampler=WARM)
  state = damage_state(init_state(hybrid.config, 3), 1)
  message = (
    r"prompts\[1\]: .* at index {} of .*: state: NaN or infinity in this"
  )
  with pytest.raises(NonFiniteError, match=message.format(0)) as raised:
    run(PROMPTS, NEW, state=state)
  assert raised.value.rows == [1]
  assert raised.value.tokens == [want[0], [], want[2]]

  first = run(PROMPTS, 5, return_state=True)
  pending = [[token] for token in first.pending]
  state = damage_state(first.state, 1)
  with pytest.raises(NonFiniteError, match=message.format(5)) as raised:
    run(pending, NEW - 5, state=state, index=first.index)
  assert raised.value.tokens == [want[0][5:], [], want[2][5:]]


def meet(token, prompt, row):
  """Tokens of a row whose logits are NaN after it reads `token`."""
  if token in prompt:
    return []
  return row[: row.index(token) + 1] if token in row[:-1] else row


@pytest.mark.parametrize(
  "size", [1, *(pytest.param(n, marks=pytest.mark.deep) for n in (5, 16))]
)
def test_nan_on_the_way_ends_a_row_there(hybrid, size):
  """At a token whose embedding is NaN; the tokens before it are not lost."""
  whole = argmax_chain(hybrid)
  n = next(i for i in range(3, NEW) if whole[0][i] not in whole[0][:i])
  token = whole[0][n]
  params = damage_params(hybrid.params, "embedding/table", token)
  want = [meet(token, *pair) for pair in zip(PROMPTS, whole, strict=True)]
  assert len(want[0]) == n + 1 < NEW
  options = {"rng": KEY, "sampler": GREEDY, "tokens_per_dispatch": size}
  received = [[], [], []]
  with pytest.raises(
    NonFiniteError, match=rf"^prompts\[0\].* index {n + 1} .*embedding/table"
  ) as raised:
    generate(
      params,
      hybrid.config,
      PROMPTS,
      NEW,
      on_tokens=lambda row, ids: received[row].extend(ids),
      **options,
    )
  assert raised.value.tokens == received == want
  assert raised.value.rows == [
    i for i, row in enumerate(want) if len(row) < NEW
  ]

  received = []
  with pytest.raises(NonFiniteError, match=rf"at index {n + 1} of"):
    for token in stream(params, hybrid.config, PROMPTS[0], NEW, **options):
      received.append(token)
  assert received == want[0]


@pytest.mark.slow
def test_finite_weights_that_overflow_are_told_from_damaged_ones(attention):
  params = {**attention.params, "head": attention.params["head"] * 3e38}
  assert jnp.isfinite(params["head"]).all()
  with pytest.raises(
    NonFiniteError, match="params, state: all finite; dtype=float32 overflows"
  ):
    generate(params, attention.config, PROMPTS, NEW, rng=KEY)


def test_what_a_sampler_leaves_out_is_no_failure(attention):
  """Neither is a logit of -inf beside finite ones; NaN and +inf are."""
  inf, nan = np.inf, np.nan
  logits = jnp.array([[-inf, 2.0], [nan, 2.0], [inf, 2.0], [-inf, -inf]])
  assert is_usable(logits).tolist() == [True, False, False, False]
  assert is_usable(logits[None, :, ::-1]).tolist() == [[True] + [False] * 3]
  sampler = Sampler(top_k=2, top_p=1e-3, vocab_size=5)
  rows = generate(
    attention.params, attention.config, PROMPTS, NEW, rng=KEY, sampler=sampler
  )
  assert [len(row) for row in rows] == [NEW] * 3 and max(map(max, rows)) < 5


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"prompts": []}, "prompts"),
    ({"prompts": [[1], []]}, r"prompts\[1\]"),
    ({"prompts": [[1, 61]]}, r"prompts\[0\].*\[0, 61\).*61"),
    ({"prompts": [[0.5]]}, r"prompts\[0\]: expected integers.*float"),
    ({"prompts": [[True]]}, r"prompts\[0\]: expected integers.*bool"),
    ({"prompts": ["text"]}, r"prompts\[0\]: expected a list of token ids"),
    ({"prompts": [[1, 2**70]]}, r"prompts\[0\]: expected integers"),
    ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"max_new_tokens": 2**31}, "state: has room for max_length=2147483647"),
    ({"index": [1, 2]}, "index"),
    ({"index": -1}, "index: expected 0 to"),
    ({"index": 2**31}, "index: expected 0 to"),
    ({"stop_ids": [-1]}, "stop_ids"),
    ({"sampler": Sampler(top_k=62)}, "top_k"),
    ({"rng": jnp.zeros((2,), jnp.uint32)}, "rng"),
  ],
)
def test_bad_requests_are_refused_by_name(attention, change, message):
  request = {
    "params": attention.params,
    "config": attention.config,
    "prompts": [[1, 2]],
    "max_new_tokens": 4,
    "rng": KEY,
  } | change
  with pytest.raises(ValueError, match=message):
    generate(**request)


def test_stream_refuses_at_the_call(attention):
  with pytest.raises(ValueError, match="tokens_per_dispatch"):
    stream(
      attention.params,
      attention.config,
      [1],
      4,
      rng=KEY,
      tokens_per_dispatch=0,
    )
  with pytest.raises(ValueError, match=r"prompts\[0\]"):
    stream(attention.params, attention.config, [], 4, rng=KEY)
