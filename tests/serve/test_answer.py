"""Text of answers: whole characters, stop strings, any grouping."""

import itertools

import pytest

from gdn2_jax.data.tokenizer.api import BytesTokenizer
from gdn2_jax.serve.answer import Answer

DECODE = BytesTokenizer().decode


def answer(text, stops=(), context=b"", size=1):
  """Text, pieces and tokens of an answer whose tokens come `size` at a time."""
  ids = list(text.encode() if isinstance(text, str) else text)
  got, pieces = Answer(DECODE, list(context), stops), []
  for group in itertools.batched(ids, size):
    pieces.append(got.push(group))
  pieces.append(got.end())
  assert "".join(pieces) == got.text
  return got, pieces


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
  ("text", "stops", "kept", "tokens"),
  [
    ("hello", (), "hello", 5),
    ("hello\nworld", ("\n",), "hello", 6),
    ("ab<end>cd", ("<end>",), "ab", 7),
    ("ab<en", ("<end>",), "ab<en", 5),
    ("aab", ("ab",), "a", 3),
    ("xaaab", ("aab", "zz"), "xa", 5),
    ("abc", ("bc", "b"), "a", 2),
    ("caf\u00e9!", ("\u00e9",), "caf", 5),
    ("b", ("b",), "", 1),
  ],
)
def test_an_answer_ends_before_its_first_stop(text, stops, kept, tokens, size):
  got, _ = answer(text, stops, size=size)
  assert got.text == kept and len(got.tokens) == tokens
  assert got.stopped == (kept != text)


def test_text_that_may_begin_a_stop_is_held_back():
  _, pieces = answer("ab<ex", ("<end>",))
  assert pieces == ["a", "b", "", "", "<ex", ""]


def test_characters_are_whole_and_continue_the_context():
  smile = "\U0001f642".encode()
  _, pieces = answer(smile + b"!")
  assert pieces == ["", "", "", "\U0001f642", "!", ""]
  got, _ = answer(smile[2:], context=b"x" + smile[:2])
  assert got.text == "\U0001f642"
  got, _ = answer(smile[:2])
  assert got.text == "\ufffd"
