"""Incremental decoding of token ids to text, in whole characters."""

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"


class TextStream:
  """Decodes token ids to text one at a time.

  A token may end inside a multi-byte character, which then decodes to U+FFFD
  until its other bytes arrive. A U+FFFD at the very end is held back; the text
  before it can no longer change. The pieces join to decode(all ids) for any
  decoder whose text for a longer list starts with the text for a shorter one,
  up to such a tail.

  Args:
    decode: maps token ids to text, with U+FFFD for invalid UTF-8.
  """

  def __init__(self, decode: Callable[[Sequence[int]], str]):
    self._decode = decode
    self._context: list[int] = []  # returned already; decoders may look back
    self._pending: list[int] = []
    self._shown = 0  # characters of decode(context + pending)

  def push(self, token: int) -> str:
    """Returns the text that is final after `token`; may be empty."""
    self._pending.append(token)
    text = self._decode(self._context + self._pending)
    if text.endswith(_REPLACEMENT):
      settled = text[self._shown : -1]
      self._shown += len(settled)
      return settled
    settled = text[self._shown :]
    # No open character: keep only the last tokens, so a step costs O(1).
    self._context, self._pending = self._pending, []
    self._shown = len(self._decode(self._context))
    return settled

  def flush(self) -> str:
    """Returns the text held back; call once, after the last token."""
    return self._decode(self._context + self._pending)[self._shown :]
