"""Streaming text: no character is split, lost or repeated."""

import random

import pytest

from gdn2_jax.inference.text import TextStream

TEXT = "naive cafe\u0301, \u00fcber, \u65e5\u672c\u8a9e, \U0001f600!\n"


def decode_bytes(ids):
  return bytes(ids).decode("utf-8", errors="replace")


def pieces_of(ids, decode):
  text = TextStream(decode)
  pieces = [text.push(i) for i in ids]
  return [*pieces, text.flush()]


def test_bytes_make_whole_characters():
  pieces = pieces_of(TEXT.encode(), decode_bytes)
  assert "".join(pieces) == TEXT
  assert not any("\ufffd" in piece for piece in pieces)
  # ASCII is not held back.
  assert pieces[:3] == ["n", "a", "i"]


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_an_unfinished_character_comes_out_at_the_end(cut):
  ids = b"ab" + "\U0001f600".encode()[:cut]
  pieces = pieces_of(ids, decode_bytes)
  assert "".join(pieces) == "ab\ufffd"
  assert pieces[-1] == "\ufffd"


def test_arbitrary_bytes_give_what_decoding_at_once_gives():
  draw = random.Random(0)
  for _ in range(300):
    # Mostly lead and continuation bytes, so that most of it is invalid.
    ids = [
      draw.choice((draw.randrange(256), draw.randrange(0x80, 0xF8)))
      for _ in range(draw.randrange(1, 30))
    ]
    assert "".join(pieces_of(ids, decode_bytes)) == decode_bytes(ids)


def test_tokens_of_several_bytes_and_tokens_without_text():
  table = [b"\xf0\x9f", b"\x98\x80 h", b"i", b"", b"\xe6\x97", b"\xa5"]

  def decode(ids):
    return b"".join(table[i] for i in ids).decode("utf-8", errors="replace")

  ids = [0, 1, 3, 2, 4, 3, 5]
  assert pieces_of(ids, decode)[:4] == ["", "\U0001f600 h", "", "i"]
  assert "".join(pieces_of(ids, decode)) == decode(ids)


def test_a_decoder_that_drops_the_first_space():
  words = [" the", " cat", "s", " sat"]

  def decode(ids):
    return "".join(words[i] for i in ids).removeprefix(" ")

  assert "".join(pieces_of([0, 1, 2, 3, 0], decode)) == "the cats sat the"


def test_the_work_per_token_does_not_grow():
  longest = 0

  def decode(ids):
    nonlocal longest
    longest = max(longest, len(ids))
    return decode_bytes(ids)

  pieces_of(b"abc" * 200, decode)
  assert longest <= 2
