"""SentencePiece models, as they come with Llama: a file tokenizer.model."""

import base64
import json
import os
import pathlib
import re
from collections.abc import Iterable
from typing import Any, SupportsIndex, override

from gdn2_jax.data.tokenizer.base import Tokenizer, check_text

FORMAT = "gdn2-sentencepiece-tokenizer"

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class SentencePieceTokenizer(Tokenizer):
  """A tokenizer.model of the `sentencepiece` library.

  As the library does, a space is put before each text and the model's own
  normalisation applies, so decode(encode(text)) may differ from the text in
  white space. Documents end with the model's </s>; its <s> is not used.
  """

  def __init__(self, model: bytes):
    try:
      import sentencepiece
    except ModuleNotFoundError as error:
      raise ModuleNotFoundError(
        "a tokenizer.model needs sentencepiece: pip install 'gdn2-jax[data]'"
      ) from error
    self._model = model
    self._backend: Any = sentencepiece.SentencePieceProcessor()
    self._backend.LoadFromSerializedProto(model)
    self.vocab_size: int = self._backend.vocab_size()
    self.eos_id: int = self._backend.eos_id()
    if self.eos_id < 0:
      raise ValueError("the model has no end-of-document token </s>")

  def __getstate__(self) -> bytes:
    return self._model  # the processor itself does not pickle

  def __setstate__(self, state: bytes) -> None:
    self.__init__(state)

  @override
  def encode(self, text: str) -> list[int]:
    check_text(text)
    return self._backend.encode(text, out_type=int)

  @override
  def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
    return [self.encode(text) for text in texts]

  @override
  def decode(self, ids: Iterable[SupportsIndex]) -> str:
    kept = [
      token
      for token in self._check_ids(ids)
      if not (self._is_special(token) or self._backend.is_unused(token))
    ]
    return self._backend.decode(kept)

  @override
  def token_bytes(self, token_id: SupportsIndex) -> bytes:
    (token,) = self._check_ids([token_id])
    if self._is_special(token) or self._backend.is_unused(token):
      return b""
    piece = self._backend.id_to_piece(token)
    if self._backend.is_byte(token) and (match := _BYTE.fullmatch(piece)):
      return bytes.fromhex(match[1])
    return piece.replace("\u2581", " ").encode()

  @override
  def to_json(self) -> str:
    model = base64.b64encode(self._model).decode()
    content = {"format": FORMAT, "version": 1, "model": model}
    return json.dumps(content, indent=2) + "\n"

  def _is_special(self, token: int) -> bool:
    return self._backend.is_control(token) or self._backend.is_unknown(token)


def load_model(path: str | os.PathLike[str]) -> SentencePieceTokenizer:
  """Reads a tokenizer.model.

  Raises:
    RuntimeError: if it is no such file.
    ValueError: if it has no token for the end of a document.
  """
  return SentencePieceTokenizer(pathlib.Path(path).read_bytes())


def from_json(content: dict[str, Any]) -> SentencePieceTokenizer:
  """The inverse of `SentencePieceTokenizer.to_json`, parsed.

  Raises:
    ValueError: for another version or a damaged model.
  """
  if content.get("version") != 1:
    raise ValueError("a newer version of the SentencePiece format")
  return SentencePieceTokenizer(
    base64.b64decode(content["model"], validate=True)
  )
