"""Text of one answer: whole characters, ended by stop strings."""

from collections.abc import Callable, Sequence
from typing import Any

from gdn2_jax.inference.text import TextStream


class Answer:
  """Turns the tokens of one answer into text, up to the first stop string.

  Text that may be the beginning of a stop string is held back. Where the text
  ends depends on the tokens alone, not on how many come at once.

  Args:
    decode: maps token ids to text.
    context: last tokens of the text before the answer.
    stops: strings that end the answer and are no part of it.

  Attributes:
    tokens: ids so far; of a stop string up to the token that completed it.
    text: text so far, without what is held back.
    stopped: True once a stop string was found; later tokens are ignored.
  """

  def __init__(
    self,
    decode: Callable[[Any], str],
    context: Sequence[int],
    stops: Sequence[str] = (),
  ):
    self._stream = TextStream(decode)
    for token in context:
      self._stream.push(token)
    self._stops = tuple(stops)
    self._held = ""
    self.tokens: list[int] = []
    self.text = ""
    self.stopped = False

  def push(self, ids: Sequence[int]) -> str:
    """Adds tokens; returns the text that is final after them."""
    start = len(self.text)
    for token in ids:
      if self.stopped:
        break
      self.tokens.append(token)
      self._add(self._stream.push(token))
    return self.text[start:]

  def end(self) -> str:
    """Returns the text held back; call once, after the last token."""
    start = len(self.text)
    if not self.stopped:
      self._add(self._stream.flush())
    if not self.stopped:
      self.text += self._held
      self._held = ""
    return self.text[start:]

  def _add(self, piece: str) -> None:
    held = self._held + piece
    found = [held.find(stop) for stop in self._stops]
    found = [at for at in found if at >= 0]
    if found:
      self.stopped = True
      self.text += held[: min(found)]
      self._held = ""
      return
    keep = max((_overlap(held, stop) for stop in self._stops), default=0)
    cut = len(held) - keep
    self.text += held[:cut]
    self._held = held[cut:]


def _overlap(text: str, stop: str) -> int:
  """Length of the longest end of `text` with which `stop` begins."""
  for size in range(min(len(text), len(stop) - 1), 0, -1):
    if text.endswith(stop[:size]):
      return size
  return 0
