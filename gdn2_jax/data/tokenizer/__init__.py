"""Tokenizers: bytes, byte-level BPE, SentencePiece."""

from gdn2_jax.data.tokenizer.api import load_tokenizer, open_tokenizer
from gdn2_jax.data.tokenizer.base import Tokenizer

__all__ = [
  "Tokenizer",
  "load_tokenizer",
  "open_tokenizer",
]
