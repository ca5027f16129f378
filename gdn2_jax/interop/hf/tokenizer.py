"""Tokenizers as transformers reads them, with the same ids."""

import json
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from gdn2_jax.data.tokenizer.api import (
  BPETokenizer,
  BytesTokenizer,
  byte_alphabet,
)
from gdn2_jax.data.tokenizer.base import Tokenizer

_PAD = "<|pad|>"


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any] | None:
  """tokenizer.json with the ids of a tokenizer; None if there is none.

  A SentencePiece model has none. Special tokens are not added to texts, as the
  model was trained without them.
  """
  if isinstance(tokenizer, BytesTokenizer):
    return _of_bytes(tokenizer)
  if not isinstance(tokenizer, BPETokenizer):
    return None
  content = json.loads(tokenizer.to_json())
  backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
  if backend.encode("a").ids != tokenizer.encode("a"):
    content["post_processor"] = None
  return content


def settings(
  content: dict[str, Any], eos_id: int
) -> tuple[dict[str, Any], dict[str, int]]:
  """tokenizer_config.json, and the ids of the end and of padding.

  A tokenizer without a padding token pads with the end of a document.

  Args:
    content: tokenizer.json.
    eos_id: Id of the end of a document.
  """
  backend = tokenizers.Tokenizer.from_str(json.dumps(content))
  end = backend.id_to_token(eos_id)
  pad_id = backend.token_to_id(_PAD)
  pad = end if pad_id is None else _PAD
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": end,
    "pad_token": pad,
    "padding_side": "left",
    "clean_up_tokenization_spaces": False,
    # A text that spells a special token has ordinary tokens for it.
    "split_special_tokens": True,
  }
  ids = {
    "eos_token_id": eos_id,
    "pad_token_id": eos_id if pad_id is None else pad_id,
  }
  return config, ids


def _of_bytes(tokenizer: BytesTokenizer) -> dict[str, Any]:
  """A byte-level BPE without merges, whose ids are the bytes."""
  backend = tokenizers.Tokenizer(models.BPE(byte_alphabet(), []))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  backend.decoder = decoders.ByteLevel()
  special = json.loads(tokenizer.to_json())["special"]
  backend.add_special_tokens(special)
  assert backend.token_to_id(special[0]) == tokenizer.eos_id
  return json.loads(backend.to_str())
