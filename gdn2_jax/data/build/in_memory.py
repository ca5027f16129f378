"""A corpus in memory packed into a folder; see `gdn2_jax.data.packed`."""

import hashlib
import json
import os
import pathlib
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from gdn2_jax.data import files
from gdn2_jax.data.packed.folder import (
  COUNTS,
  EOS_POLICY,
  FORMAT,
  SPLITS,
  VERSION,
  Packed,
  file_names,
  identity,
  open_packed,
  token_dtype,
)
from gdn2_jax.data.text import corpus as corpora
from gdn2_jax.data.tokenizer.api import Tokenizer, open_tokenizer

__all__ = ["Packed", "build_packed", "open_packed", "pack_corpus"]

_BATCH = 256  # documents per call of the tokenizer: bounds the memory

Progress = Callable[[Iterable[Any], str], Iterable[Any]]


def build_packed(
  corpus: corpora.Corpus,
  tokenizer: Tokenizer,
  path: str | os.PathLike[str],
  *,
  tokenizer_spec: str,
  seed: int = 0,
  validation_fraction: float = 0.1,
  progress: Progress = lambda items, _: items,
) -> Packed:
  """Packs a corpus into a folder that appears whole or not at all.

  Any number of builders may aim at one folder: each works in its own staging
  folder, the first to finish renames it, the others use what they find.

  Args:
    corpus: the documents; split by hash, then shuffled within each split.
    tokenizer: gives the ids.
    path: the folder to make; must not exist, be empty, or hold the same data.
    tokenizer_spec: what the user called the tokenizer, for the manifest.
    seed: of the document order.
    validation_fraction: expected share of held-out documents.
    progress: wraps the iteration over batches of documents, for a bar.

  Returns:
    The packed folder, opened.

  Raises:
    ValueError: if `path` holds anything else, or no training text is left.
  """
  path = pathlib.Path(path)
  header = _header(corpus, tokenizer, tokenizer_spec, seed, validation_fraction)
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    return _reuse(path, header)
  halves = corpora.split_documents(
    corpus.documents, validation_fraction=validation_fraction
  )
  if not any(document.text for document in halves[0]):
    raise ValueError(
      f"source={corpus.source!r}: no training text in"
      f" {len(corpus.documents)} documents"
    )
  staging = files.open_staging(path)
  splits = {}
  for split, documents in zip(SPLITS, halves, strict=True):
    ordered = corpora.shuffle_documents(documents, seed=seed)
    batches = progress(list(_batches(ordered)), split)
    splits[split] = _write_split(staging, split, batches, tokenizer)
  files.write_synced(staging / "tokenizer.json", tokenizer.to_json().encode())
  manifest = json.dumps(header | {"splits": splits}, indent=2) + "\n"
  files.write_synced(staging / "manifest.json", manifest.encode())
  if not files.publish(staging, path):
    return _reuse(path, header)
  return open_packed(path)


def pack_corpus(
  corpus: corpora.Corpus,
  path: str | os.PathLike[str],
  *,
  tokenizer_spec: str,
  cache_dir: str | os.PathLike[str] | None = None,
  seed: int = 0,
  progress: Progress = lambda items, _: items,
) -> Packed:
  """`build_packed` with a tokenizer by name, trained where it has to be.

  Args:
    corpus: the documents; "bpe-N" sees the training ones only.
    path: the folder to make.
    tokenizer_spec: see `gdn2_jax.data.tokenizer.open_tokenizer`.
    cache_dir: where trained tokenizers are kept; None keeps none.
    seed: of the document order.
    progress: wraps the iteration over batches of documents.

  Raises:
    ValueError: as `open_tokenizer` and `build_packed`.
  """
  train, _ = corpora.split_documents(corpus.documents)
  tokenizer = open_tokenizer(
    tokenizer_spec,
    train_texts=[document.text for document in train],
    corpus_sha256=corpus.sha256,
    cache_dir=cache_dir,
  )
  return build_packed(
    corpus,
    tokenizer,
    path,
    tokenizer_spec=tokenizer_spec,
    seed=seed,
    progress=progress,
  )


def _header(
  corpus: corpora.Corpus,
  tokenizer: Tokenizer,
  tokenizer_spec: str,
  seed: int,
  validation_fraction: float,
) -> dict[str, Any]:
  """The part of the manifest that is known before anything is written."""
  return {
    "format": FORMAT,
    "version": VERSION,
    "source": corpus.source,
    "corpus_sha256": corpus.sha256,
    "invalid_utf8_documents": corpus.invalid_utf8,
    "python": platform.python_version(),
    "seed": seed,
    "validation_fraction": validation_fraction,
    "eos_policy": EOS_POLICY,
    "tokenizer": {
      "spec": tokenizer_spec,
      "sha256": tokenizer.sha256,
      "vocab_size": tokenizer.vocab_size,
      "eos_id": tokenizer.eos_id,
    },
    "dtype": token_dtype(tokenizer.vocab_size).name,
  }


def _batches(
  documents: Sequence[corpora.Document],
) -> Iterator[Sequence[corpora.Document]]:
  for start in range(0, len(documents), _BATCH):
    yield documents[start : start + _BATCH]


def _write_split(
  folder: pathlib.Path,
  split: str,
  batches: Iterable[Sequence[corpora.Document]],
  tokenizer: Tokenizer,
) -> dict[str, Any]:
  """Writes the two files of a split and returns its manifest entry."""
  dtype = token_dtype(tokenizer.vocab_size).newbyteorder("<")
  (tokens_name,) = file_names(split, {}, "tokens")
  (offsets_name,) = file_names(split, {}, "offsets")
  counts = dict.fromkeys(COUNTS, 0)
  offsets = [0]
  digest = hashlib.sha256()
  with open(folder / tokens_name, "wb") as file:
    for batch in batches:
      texts = [document.text for document in batch if document.text]
      counts["empty_documents"] += len(batch) - len(texts)
      for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        ids = [*ids, tokenizer.eos_id]
        assert min(ids) >= 0 and max(ids) < tokenizer.vocab_size
        data = np.asarray(ids, dtype).tobytes()
        file.write(data)
        digest.update(data)
        offsets.append(offsets[-1] + len(ids))
        size = len(text.encode())
        counts["bytes"] += size
        counts["predicted_bytes"] += size - tokenizer.first_token_bytes(ids[0])
    file.flush()
    os.fsync(file.fileno())
  counts["documents"] = len(offsets) - 1
  counts["tokens"] = offsets[-1]
  data = np.asarray(offsets, "<i8").tobytes()
  files.write_synced(folder / offsets_name, data)
  return counts | {
    "files": {
      tokens_name: {
        "size": offsets[-1] * dtype.itemsize,
        "sha256": digest.hexdigest(),
      },
      offsets_name: {
        "size": len(data),
        "sha256": files.sha256_bytes(data),
      },
    }
  }


def _reuse(path: pathlib.Path, header: dict[str, Any]) -> Packed:
  """Opens what is there if it is what would have been built."""
  if not path.is_dir() or not (path / "manifest.json").is_file():
    raise ValueError(f"{path}: exists and is not a packed folder")
  packed = open_packed(path)
  found = identity(packed.manifest)
  for name, value in identity(header).items():
    if found[name] != value:
      raise ValueError(
        f"{path}: already holds other data, {name} is {found[name]!r} and not"
        f" {value!r}; remove it or choose another folder"
      )
  return packed
