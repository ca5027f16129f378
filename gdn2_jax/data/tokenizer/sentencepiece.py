"""SentencePiece models, as they come with Llama: a file tokenizer.model."""

import base64
import json
from collections.abc import Iterable
from typing import Any, SupportsIndex, override

from gdn2_jax.data.tokenizer.base import Tokenizer, check_text

FORMAT = "gdn2-sentencepiece-tokenizer"


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

  def __reduce__(self) -> tuple[Any, ...]:
    return SentencePieceTokenizer, (self._model,)

  @override
  def encode(self, text: str) -> list[int]:
    check_text(text)
    return self._backend.encode(text, out_type=int)

  @override
  def decode(self, ids: Iterable[SupportsIndex]) -> str:
    kept = [t for t in self._check_ids(ids) if not self._has_no_text(t)]
    return self._backend.decode(kept)

  @override
  def token_bytes(self, token_id: SupportsIndex) -> bytes:
    (token,) = self._check_ids([token_id])
    if self._has_no_text(token):
      return b""
    piece = self._backend.id_to_piece(token)
    if self._backend.is_byte(token):  # "<0x41>"
      return bytes.fromhex(piece[3:5])
    return piece.replace("\u2581", " ").encode()

  @override
  def to_json(self) -> str:
    model = base64.b64encode(self._model).decode()
    content = {"format": FORMAT, "version": 1, "model": model}
    return json.dumps(content, indent=2) + "\n"

  def _has_no_text(self, token: int) -> bool:
    backend = self._backend
    return (
      backend.is_control(token)
      or backend.is_unknown(token)
      or backend.is_unused(token)
    )
