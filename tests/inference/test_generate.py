"""Generation: what comes out, when it stops, what it costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.inference.generate import (
  decode_block,
  generate,
  read_prompts,
  stream,
)
from gdn2_jax.inference.sampling import GREEDY, Sampler

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


def row_keys(rows):
  return jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(rows))


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


def test_decoding_ends_when_every_row_is_done(hybrid):
  """Rows that are done do not run on to max_new_tokens."""
  args = (hybrid.params, hybrid.config)
  free = generate(*args, PROMPTS, NEW, rng=KEY, sampler=WARM)
  stops = jnp.full((8,), -1, jnp.int32)
  stops = stops.at[:3].set(jnp.asarray([row[3] for row in free]))
  keys = row_keys(3)
  carry = read_prompts(*args, PROMPTS, keys, stops, WARM)
  _, carry = decode_block(
    args[0],
    carry,
    jnp.asarray(NEW - 1, jnp.int32),
    keys,
    stops,
    sampler=WARM,
    size=16,
  )
  assert carry.index <= 4 < NEW
  assert carry.done.all()


def test_memory_does_not_grow_with_the_number_of_tokens(hybrid):
  """Beside the output: compiled temporaries for 16 and for 65536 tokens."""
  args = (hybrid.params, hybrid.config)
  keys = row_keys(3)
  stops = jnp.full((8,), -1, jnp.int32)
  carry = read_prompts(*args, PROMPTS, keys, stops, WARM)

  def compiled(size):
    return (
      decode_block.lower(
        args[0],
        carry,
        jnp.asarray(3, jnp.int32),
        keys,
        stops,
        sampler=WARM,
        size=size,
      )
      .compile()
      .memory_analysis()
    )

  small, large = compiled(16), compiled(65536)
  buffer = 3 * 65536 * 4
  assert large.output_size_in_bytes - small.output_size_in_bytes <= buffer
  # The loop may hold one copy of the buffer, and nothing else of that size.
  grown = large.temp_size_in_bytes - small.temp_size_in_bytes
  assert grown <= buffer, grown


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"prompts": []}, "prompts"),
    ({"prompts": [[1], []]}, r"prompts\[1\]"),
    ({"prompts": [[1, 61]]}, r"prompts\[0\].*\[0, 61\).*61"),
    ({"max_new_tokens": 0}, "max_new_tokens"),
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
