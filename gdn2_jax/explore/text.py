"""Texts as tokens of a model, with labels that show every character."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int

MIN_TOKENS = 2
_SHOWN = {"\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d"}


@dataclasses.dataclass(frozen=True)
class Text:
  """Tokens of a text, perhaps only the first ones.

  Attributes:
    ids: token ids [T].
    pieces: text of every token as it is shown, "" for none.
    length: tokens of the whole text.
  """

  ids: Int[np.ndarray, " T"]
  pieces: tuple[str, ...]
  length: int

  @property
  def is_cut(self) -> bool:
    """True if there are more tokens than these."""
    return self.length > len(self.ids)


def read_text(tokenizer: Any, text: str, max_tokens: int) -> Text:
  """The first tokens of a text.

  Args:
    tokenizer: one of `gdn2_jax.data.tokenizer`.
    text: any text of two tokens or more.
    max_tokens: later tokens are left out.

  Raises:
    ValueError: no tokenizer, a text that is too short, or max_tokens < 2.
  """
  if tokenizer is None:
    raise ValueError("run: a model without a tokenizer, expected one with it")
  if max_tokens < MIN_TOKENS:
    raise ValueError(f"max_tokens={max_tokens}: expected at least {MIN_TOKENS}")
  ids = np.asarray(tokenizer.encode(text), np.int32)
  if len(ids) < MIN_TOKENS:
    raise ValueError(
      f"text={text!r}: {len(ids)} tokens, expected at least {MIN_TOKENS}"
    )
  kept = ids[:max_tokens]
  pieces = tuple(label(tokenizer, token) for token in kept.tolist())
  return Text(kept, pieces, len(ids))


def label(tokenizer: Any, token: int) -> str:
  """Text of one token, with marks for line breaks, tabs and its end.

  A part of a character is shown as U+FFFD, an id without text as its number.
  """
  if token == tokenizer.eos_id:
    return "<end>"
  known = token < tokenizer.vocab_size
  text = (
    tokenizer.token_bytes(token).decode("utf-8", "replace") if known else ""
  )
  return "".join(_SHOWN.get(c, c) for c in text) or f"<{token}>"
