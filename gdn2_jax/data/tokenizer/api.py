"""Tokenizers: bytes, a byte-level BPE trained here, or a user's file.

All of them treat text as text: a document that spells a special token gets
ordinary tokens for it, so no input can forge the end of a document. Ids of
special tokens decode to nothing. "bytes" and "bpe-N" are lossless,
`decode(encode(text)) == text` for every string.
"""

import base64
import dataclasses
import functools
import json
import os
import pathlib
import re
from collections.abc import Iterable
from typing import Any, SupportsIndex, override

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from gdn2_jax.data.tokenizer import sentencepiece
from gdn2_jax.data.tokenizer.base import Tokenizer, check_text

EOS = "<|eos|>"
# Names under which published tokenizers carry the end of a document.
_EOS_NAMES = (EOS, "</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>")
_BYTES_FORMAT = "gdn2-bytes-tokenizer"
_BYTES_SPECIAL = (EOS, "<|bos|>", "<|pad|>")
_MIN_BPE = 257  # all bytes and the end of a document


@dataclasses.dataclass(frozen=True)
class BytesTokenizer(Tokenizer):
  """Ids 0..255 are the bytes of UTF-8; 256 ends a document; 257, 258 spare."""

  vocab_size: int = 256 + len(_BYTES_SPECIAL)
  eos_id: int = 256

  @override
  def encode(self, text: str) -> list[int]:
    return list(check_text(text))

  @override
  def decode(self, ids: Iterable[SupportsIndex]) -> str:
    kept = [token for token in self._check_ids(ids) if token < 256]
    return bytes(kept).decode("utf-8", "replace")

  @override
  def token_bytes(self, token_id: SupportsIndex) -> bytes:
    (token_id,) = self._check_ids([token_id])
    return bytes([token_id]) if token_id < 256 else b""

  @override
  def to_json(self) -> str:
    content = {"format": _BYTES_FORMAT, "version": 1, "special": _BYTES_SPECIAL}
    return json.dumps(content, indent=2) + "\n"


class BPETokenizer(Tokenizer):
  """A tokenizer.json of the `tokenizers` library; see `load_tokenizer`."""

  def __init__(self, content: str):
    backend = tokenizers.Tokenizer.from_str(content)
    # Files of published models carry these; here they would lose tokens.
    backend.no_truncation()
    backend.no_padding()
    vocabulary = backend.get_vocab(with_added_tokens=True)
    names = [name for name in _EOS_NAMES if name in vocabulary]
    if not names:
      raise ValueError(
        "tokenizer: no end-of-document token; expected one of"
        f" {', '.join(_EOS_NAMES)} in its vocabulary"
      )
    backend.encode_special_tokens = True  # not part of the saved file
    self._backend = backend
    self._added = backend.get_added_tokens_decoder()
    self.eos_id: int = vocabulary[names[0]]
    self.vocab_size: int = max(vocabulary.values()) + 1

  def __reduce__(self) -> tuple[Any, ...]:
    return BPETokenizer, (self.to_json(),)

  @override
  def encode(self, text: str) -> list[int]:
    check_text(text)
    return self._backend.encode(text, add_special_tokens=False).ids

  @override
  def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
    texts = list(texts)
    for text in texts:
      check_text(text)
    encoded = self._backend.encode_batch_fast(texts, add_special_tokens=False)
    return [item.ids for item in encoded]

  @override
  def decode(self, ids: Iterable[SupportsIndex]) -> str:
    return self._backend.decode(self._check_ids(ids), skip_special_tokens=True)

  @override
  def token_bytes(self, token_id: SupportsIndex) -> bytes:
    (token_id,) = self._check_ids([token_id])
    if token_id in self._added:
      added = self._added[token_id]
      return b"" if added.special else added.content.encode()
    token = self._backend.id_to_token(token_id)
    if token is None:  # a hole in the vocabulary
      return b""
    alphabet = byte_alphabet()
    if self._is_byte_level and all(char in alphabet for char in token):
      return bytes(alphabet[char] for char in token)
    if match := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
      return bytes.fromhex(match[1])
    return token.replace("\u2581", " ").encode()  # SentencePiece's space

  @override
  def to_json(self) -> str:
    return self._backend.to_str()

  @functools.cached_property
  def _is_byte_level(self) -> bool:
    return '"ByteLevel"' in json.dumps(json.loads(self.to_json())["decoder"])


def open_tokenizer(spec: str, *, train_texts: Iterable[str] = ()) -> Tokenizer:
  """Opens or trains the tokenizer that a configuration names.

  Args:
    spec: "bytes"; "bpe-N", trained on `train_texts` to at most N ids; or the
      path of a tokenizer.json or a SentencePiece tokenizer.model.
    train_texts: texts of the training documents, for "bpe-N" only.

  Raises:
    ValueError: for an unknown spec, N below 257 or an unusable file.
  """
  if spec == "bytes":
    return BytesTokenizer()
  if spec.startswith("bpe-"):
    return train_bpe(train_texts, _bpe_size(spec))
  return load_tokenizer(spec)


def check_spec(spec: str) -> None:
  """Refuses a tokenizer name that `open_tokenizer` would refuse."""
  if spec.startswith("bpe-"):
    _bpe_size(spec)
  elif spec != "bytes" and not pathlib.Path(spec).is_file():
    raise ValueError(
      f"tokenizer={spec!r}: expected 'bytes', 'bpe-N' (trained on the text), or"
      " the path of a tokenizer.json or tokenizer.model, which model pages on"
      " the Hugging Face Hub have among their files"
    )


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
  """Reads a tokenizer.json, ours or one of `tokenizers`, or a tokenizer.model.

  Truncation and padding set in the file are switched off, and the token that
  ends documents is found by name among the usual ones.

  Raises:
    ValueError: if the file is missing, is not such a file or has no token for
      the end of a document.
  """
  check_spec(os.fspath(path))
  try:
    if pathlib.Path(path).suffix == ".model":
      return sentencepiece.SentencePieceTokenizer(
        pathlib.Path(path).read_bytes()
      )
    text = pathlib.Path(path).read_text(encoding="utf-8")
    content = json.loads(text)
    kind = content.get("format") if isinstance(content, dict) else None
    if kind not in (_BYTES_FORMAT, sentencepiece.FORMAT):
      return BPETokenizer(text)
    if content.get("version") != 1:
      raise ValueError(f"a newer version of {kind}, expected version 1")
    if kind == _BYTES_FORMAT:
      return BytesTokenizer()
    model = base64.b64decode(content["model"], validate=True)
    return sentencepiece.SentencePieceTokenizer(model)
  except ModuleNotFoundError:
    raise
  except Exception as error:  # the library raises bare Exception
    raise ValueError(f"tokenizer={os.fspath(path)!r}: {error}") from error


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
  """Trains a byte-level BPE of at most `vocab_size` ids, EOS included."""
  backend = tokenizers.Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [
      # A number is as many tokens as it has digits, whatever numbers the
      # training text happened to hold.
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  backend.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[EOS],
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  backend.train_from_iterator(texts, trainer)
  return BPETokenizer(backend.to_str())


def _bpe_size(spec: str) -> int:
  digits = spec.removeprefix("bpe-")
  if not (digits.isascii() and digits.isdigit()) or int(digits) < _MIN_BPE:
    raise ValueError(
      f"tokenizer={spec!r}: expected bpe-N with N at least {_MIN_BPE}"
    )
  return int(digits)


@functools.cache
def byte_alphabet() -> dict[str, int]:
  """Bytes by their printable characters in byte-level BPE."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  alphabet = {chr(byte): byte for byte in printable}
  others = [byte for byte in range(256) if byte not in set(printable)]
  return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}
