"""Short needle tests from words of a text."""

import dataclasses

import pytest

from gdn2_jax.eval.ruler.short import haystacks_of, needle_test
from tests.eval.plain import make_model

TEXTS = ["The quick brown foxes jump. Over lazy dogs they leap!"]


def test_samples_of_every_size_are_scored():
  model = make_model("G")
  rows = needle_test(model, haystacks_of(TEXTS), (1, 2), count=2)
  assert [row["size"] for row in rows] == [1, 1, 2, 2]
  assert all(0 <= row["depth"] <= 1 for row in rows)
  assert rows[2]["prompt_tokens"] > rows[0]["prompt_tokens"]
  assert all(isinstance(row["forced"], bool) for row in rows)
  assert all(row["value_tokens"] == 8 and row["gain"] != 0 for row in rows)
  again = needle_test(model, haystacks_of(TEXTS), (1,), count=2)
  assert again == rows[:2]


def test_wrong_arguments_are_refused():
  model, haystacks = make_model("G"), haystacks_of(TEXTS)
  with pytest.raises(ValueError, match="task='niah': expected one of niah_si"):
    needle_test(model, haystacks, (1,), task="niah")
  with pytest.raises(ValueError, match="sizes: got 0, expected at least 1"):
    needle_test(model, haystacks, (0,))
  bare = dataclasses.replace(model, tokenizer=None)
  with pytest.raises(ValueError, match="model: no tokenizer"):
    needle_test(bare, haystacks, (1,))
  with pytest.raises(ValueError, match="texts: no words"):
    haystacks_of(["A b c"])
