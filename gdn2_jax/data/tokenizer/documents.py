"""Token ids of whole documents, in bounded memory.

A document ends with the tokenizer's EOS. Long ones are tokenised in pieces,
which bounds memory and time; they stay one document.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from gdn2_jax.data.tokenizer.base import Tokenizer

LONG_CHARS = 1 << 20
_BATCH_CHARS = 1 << 20
_WORD_CHARS = 1000  # a longer stretch without white space is cut anywhere


def token_dtype(vocab_size: int) -> np.dtype:
  """The smallest little-endian type that holds every id."""
  return np.dtype("<u2" if vocab_size < 65536 else "<u4")


def encode_documents(
  texts: list[str], tokenizer: Tokenizer
) -> list[np.ndarray]:
  """Ids [tokens] of each document, EOS included."""
  dtype = token_dtype(tokenizer.vocab_size)
  found: list[list[np.ndarray]] = [[] for _ in texts]
  pieces = (
    (piece, index)
    for index, text in enumerate(texts)
    for piece in pieces_of(text)
  )
  # Lists of integers take ten times the memory of arrays: a little at a time.
  for batch in batches_of(pieces):
    encoded = tokenizer.encode_batch([piece for piece, _ in batch])
    for (_, index), ids in zip(batch, encoded, strict=True):
      assert not ids or (min(ids) >= 0 and max(ids) < tokenizer.vocab_size)
      found[index].append(np.asarray(ids, dtype))
  end = np.asarray([tokenizer.eos_id], dtype)
  return [np.concatenate([*parts, end]) for parts in found]


def pieces_of(text: str, limit: int = LONG_CHARS) -> list[str]:
  """Pieces of at most `limit` characters, cut before white space.

  Joined they are the text; most texts are one piece. Around a cut the tokens
  may differ from those of the whole.
  """
  pieces = []
  start = 0
  while len(text) - start > limit:
    stop = start + limit
    tail = text[max(start + 1, stop - _WORD_CHARS) : stop]
    spaces = [i for i, char in enumerate(tail) if char.isspace()]
    if spaces:
      stop -= len(tail) - spaces[-1]
    pieces.append(text[start:stop])
    start = stop
  if start < len(text):
    pieces.append(text[start:])
  return pieces


def batches_of(
  items: Iterable[tuple[str, Any]],
) -> Iterator[list[tuple[str, Any]]]:
  """Groups (text, anything) pairs up to `_BATCH_CHARS` of text."""
  batch, size = [], 0
  for item in items:
    batch.append(item)
    size += len(item[0])
    if size >= _BATCH_CHARS:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch
