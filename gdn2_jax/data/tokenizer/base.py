"""Base class of all tokenizers."""

import abc
import functools
import os
from collections.abc import Iterable
from typing import SupportsIndex

from gdn2_jax import files


class Tokenizer(abc.ABC):
  """Interface of tokenizers; instances are picklable.

  Attributes:
    vocab_size: one more than the largest id.
    eos_id: the id that ends every document.
  """

  vocab_size: int
  eos_id: int

  @abc.abstractmethod
  def encode(self, text: str) -> list[int]:
    """Ids of a text, without any special token."""

  def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
    """`encode` of every text, in parallel where the backend can."""
    return [self.encode(text) for text in texts]

  @abc.abstractmethod
  def decode(self, ids: Iterable[SupportsIndex]) -> str:
    """Text of ids; special tokens give "", broken UTF-8 gives U+FFFD."""

  @abc.abstractmethod
  def token_bytes(self, token_id: SupportsIndex) -> bytes:
    """The UTF-8 bytes one id stands for, b"" for special tokens."""

  @abc.abstractmethod
  def to_json(self) -> str:
    """The content of a tokenizer.json that `load_tokenizer` reads back."""

  @functools.cached_property
  def sha256(self) -> str:
    """Hex SHA-256 of everything that decides the ids."""
    return files.sha256_bytes(self.to_json().encode())

  def first_token_bytes(self, token_id: SupportsIndex) -> int:
    """Bytes of a text that its first token stands for."""
    # Llama's tokenizers put a space before each text: no byte of the text.
    return max(0, len(self.token_bytes(token_id)) - self._added_bytes)

  @functools.cached_property
  def _added_bytes(self) -> int:
    return sum(len(self.token_bytes(i)) for i in self.encode("a")) - 1

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes `to_json()` to a file, whole or not at all."""
    files.write_atomically(path, self.to_json().encode())

  def _check_ids(self, ids: Iterable[SupportsIndex]) -> list[int]:
    checked = [int(token) for token in ids]
    for token in checked:
      if not 0 <= token < self.vocab_size:
        raise ValueError(
          f"ids: {token} is outside [0, {self.vocab_size}), the vocabulary"
        )
    return checked


def check_text(text: str) -> bytes:
  """UTF-8 bytes of a text; refuses other types and lone surrogates."""
  if not isinstance(text, str):
    raise ValueError(f"text: expected a string, got {type(text).__name__}")
  try:
    return text.encode()
  except UnicodeEncodeError as error:
    raise ValueError(f"text: a lone surrogate at {error.start}") from error
