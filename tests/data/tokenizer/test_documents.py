"""Documents in pieces."""

from gdn2_jax.data.tokenizer.documents import pieces_of


def test_pieces_join_to_the_text():
  for text in ("word " * 100, "x" * 333, "", "a b", "ab\n" * 41):
    pieces = pieces_of(text, 100)
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= 100 for piece in pieces)
  assert pieces_of("word " * 30, 98)[0] == ("word " * 20)[:94]
