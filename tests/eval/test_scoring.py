"""Scores of token lists against the full forward pass, and greedy texts."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.eval import scoring
from gdn2_jax.eval.scoring import Score, first_stop, greedy, score
from gdn2_jax.inference import NonFiniteError
from tests.eval.plain import LENGTH, expected, forward, make_model

TOLERANCE = 5e-6  # nats; measured errors are below 8e-7


def pairs(rng):
  """Pairs of many lengths: empty contexts, shared ones, one-token parts."""
  draw = lambda n: rng.integers(0, 259, n).tolist()  # noqa: E731
  shared = draw(21)
  contexts = [shared, [], draw(1), shared, draw(37), shared, []]
  return contexts, [draw(n) for n in (3, 5, 1, 1, 27, 7, 40)]


def assert_close(got: list[Score], want: list[Score]):
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(
      a.token_logprobs, b.token_logprobs, rtol=0, atol=TOLERANCE
    )
    assert abs(a.logprob - b.logprob) < TOLERANCE * len(a.token_logprobs)
    assert a.is_greedy == b.is_greedy


@pytest.mark.parametrize(
  "pattern", ["G", pytest.param("A", marks=pytest.mark.deep)]
)
def test_scores_equal_the_full_forward_pass(pattern, rng, monkeypatch):
  # The head runs in two pieces per chunk.
  monkeypatch.setattr(scoring, "_HEAD_TOKENS", 8)
  contexts, continuations = pairs(rng)
  want = [
    expected(pattern, *pair)
    for pair in zip(contexts, continuations, strict=True)
  ]
  model = make_model(pattern)
  # Contexts and continuations of several chunks, and more pairs than rows.
  got = score(model, contexts, continuations, batch_size=4, chunk_size=16)
  assert_close(got, want)
  # Each score is that of its pair alone, whatever stands beside it.
  order = rng.permutation(len(contexts))
  other = score(
    model,
    [contexts[i] for i in order],
    [continuations[i] for i in order],
    batch_size=4,
    chunk_size=16,
  )
  assert_close(other, [want[i] for i in order])
  # As many rows, so that no other programs are compiled.
  alone = score(
    model,
    [contexts[4]] * 4,
    [continuations[4]] * 4,
    batch_size=4,
    chunk_size=16,
  )
  assert_close(alone, [want[4]] * 4)


def test_greedy_texts_are_greedy_whatever_the_batch(rng):
  model = make_model("S")
  prompts = [rng.integers(32, 127, n).tolist() for n in (5, 13, 1, 9, 12)]
  done = []
  # Without a stop id, so that all texts are as long as asked for.
  texts = greedy(
    model, prompts, 8, stop_ids=(), batch_size=2, on_done=done.append
  )
  assert done == [2, 2, 1]
  ids = []
  for _ in range(8):
    padded = np.zeros((1, LENGTH), np.int32)
    padded[0, : 9 + len(ids)] = prompts[3] + ids
    logits = np.asarray(forward("S")(padded)[0])[0, 8 + len(ids)]
    ids.append(int(logits[:259].argmax()))
  assert texts[3] == model.tokenizer.decode(ids)
  again = greedy(model, prompts[2:4], 8, stop_ids=(), batch_size=2)
  assert again == texts[2:4]
  longest = max(texts, key=len)
  stop = longest[2:4]
  cut = greedy(
    model, prompts, 8, stop_ids=(), stop_strings=[stop, "never"], batch_size=2
  )
  assert cut == [text.split(stop)[0] for text in texts] != texts


def test_only_ids_of_the_tokenizer_can_be_the_most_probable():
  model = make_model("S")
  prompt = [5, 6, 7]
  best = [expected("S", prompt, [i]).is_greedy for i in range(259)].index(True)
  right, wrong = score(model, [prompt] * 2, [[best], [(best + 1) % 259]])
  assert right.is_greedy and not wrong.is_greedy
  head = model.params["head"]
  params = {**model.params, "head": head.at[:, -1].set(10 * head[:, best])}
  changed, _ = score(
    dataclasses.replace(model, params=params), [prompt] * 2, [[best]] * 2
  )
  assert changed.is_greedy and changed.logprob < right.logprob


def test_the_first_stop_string_counts():
  assert first_stop("a\nb.", [".", "\n"]) == 1
  assert first_stop("ab", ["c"]) is None


def test_bad_arguments_are_refused_by_name():
  model = make_model("A")
  with pytest.raises(ValueError, match=r"continuations: expected 2"):
    score(model, [[1], [2]], [[1]])
  with pytest.raises(ValueError, match=r"continuations\[1\]: .*at least one"):
    score(model, [[1], [2]], [[1], []])
  with pytest.raises(ValueError, match=r"contexts\[0\]: .*264"):
    score(model, [[264]], [[1]])
  with pytest.raises(ValueError, match=r"contexts\[0\]: empty"):
    score(dataclasses.replace(model, tokenizer=None), [[]], [[1]])
  with pytest.raises(ValueError, match="batch_size"):
    score(model, [], [], batch_size=0)
  with pytest.raises(ValueError, match="stop_strings"):
    greedy(model, [[1]], 1, stop_strings=[""])
  assert score(model, [], []) == [] and greedy(model, [], 1) == []


def test_nan_is_an_error_that_names_the_row():
  model = make_model("S")
  table = model.params["embedding"]["table"].at[7].set(jnp.nan)
  params = {**model.params, "embedding": {"table": table}}
  damaged = dataclasses.replace(model, params=params)
  with pytest.raises(NonFiniteError, match=r"contexts\[1\]: NaN at token"):
    score(damaged, [[1, 2], [1]], [[3], [7, 1]])
  with pytest.raises(NonFiniteError, match=r"prompts\[2\]: non-finite"):
    greedy(damaged, [[1], [2], [7, 3]], 8, stop_ids=(), batch_size=2)
