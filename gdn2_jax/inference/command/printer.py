"""Printing of text as it is generated, and its speed."""

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from gdn2_jax.inference.command.turn import TAIL, TOKENS_PER_DISPATCH
from gdn2_jax.inference.text import TextStream


@runtime_checkable
class Output(Protocol):
  """A stream of text to write to."""

  def write(self, text: str, /) -> Any:
    """Adds text."""

  def flush(self) -> Any:
    """Passes on what was written."""


class Printer:
  """Prints text as it comes, and measures its speed.

  Args:
    decode: maps token ids to text.
    tail: the last tokens of the earlier text, which is not printed again.
    out: stream that gets the text.

  Attributes:
    count: number of tokens printed.
  """

  def __init__(
    self,
    decode: Callable[[list[int]], str],
    tail: Sequence[int],
    out: Output,
  ):
    self._decode, self._out = decode, out
    self._text = _stream_after(decode, tail)
    self._times: list[float] = []  # of every token
    self._start = time.perf_counter()

  @property
  def count(self) -> int:
    """Number of tokens printed."""
    return len(self._times)

  @property
  def latency(self) -> float | None:
    """Seconds to the first token; None before it."""
    return self._times[0] if self._times else None

  @property
  def rate(self) -> float | None:
    """Tokens per second after the first dispatches; None for short texts."""
    times, warm = self._times, 1 + TOKENS_PER_DISPATCH
    if len(times) <= warm:
      return None
    return (len(times) - warm) / (times[-1] - times[warm - 1])

  def prompt(self, prompt: str | None, ids: list[int]) -> None:
    """Prints text of the user."""
    if prompt:
      # A character that the earlier text left unfinished stays so.
      self._print(self._text.flush() + prompt)
      self._text = _stream_after(self._decode, ids[-TAIL:])

  def tokens(self, tokens: list[int]) -> None:
    """Prints tokens that were generated."""
    self._times += [time.perf_counter() - self._start] * len(tokens)
    self._print("".join(self._text.push(token) for token in tokens))

  def end(self, complete: bool) -> None:
    """Ends the line; if no more can follow, with the text held back."""
    self._print((self._text.flush() if complete else "") + "\n")

  def _print(self, text: str) -> None:
    self._out.write(text)
    self._out.flush()


def _stream_after(decode, tokens) -> TextStream:
  """A TextStream that has returned the text of these tokens already."""
  text = TextStream(decode)
  for token in tokens:
    text.push(token)
  return text
