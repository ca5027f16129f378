"""Documents packed into one flat token file per split.

A packed folder holds, for each split, the tokens of all documents end to end
and where each begins, plus the tokenizer and a manifest with the hash of
every file:

  manifest.json      format, counts, hashes, tokenizer, corpus, Python version
  tokenizer.json     see `gdn2_jax.data.tokenizer`
  SPLIT.tokens.bin   little-endian uint16 (uint32 from 65536 ids on)
  SPLIT.offsets.bin  little-endian int64 [documents + 1], first token of each

SPLIT is "train" or "validation". Every document ends with the tokenizer's EOS
and empty ones are left out. `gdn2_jax.data.rows` reads rows of any length.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from gdn2_jax.data import corpus as corpora
from gdn2_jax.data import files
from gdn2_jax.data.tokenizer import Tokenizer, load_tokenizer, open_tokenizer

FORMAT = "gdn2-packed-rows"
VERSION = 1
SPLITS = ("train", "validation")
EOS_POLICY = "one EOS after every document; the target after it is masked"

_BATCH = 256  # documents per call of the tokenizer: bounds the memory
_COUNTS = ("documents", "empty_documents", "tokens", "bytes", "predicted_bytes")

Progress = Callable[[Iterable[Any], str], Iterable[Any]]


@dataclasses.dataclass(frozen=True)
class Packed:
  """An open packed folder; arrays are read-only memory maps.

  Attributes:
    path: the folder.
    manifest: the content of manifest.json.
    tokenizer: the tokenizer the tokens were made with.
    tokens: split -> uint16 or uint32 [tokens].
    offsets: split -> int64 [documents + 1].
  """

  path: pathlib.Path
  manifest: dict[str, Any]
  tokenizer: Tokenizer
  tokens: dict[str, np.ndarray]
  offsets: dict[str, np.ndarray]

  def file_hashes(self) -> dict[str, str]:
    """SHA-256 of every token and offset file, by file name."""
    return {
      name: entry["sha256"]
      for split in SPLITS
      for name, entry in self.manifest["splits"][split]["files"].items()
    }


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


def open_packed(
  path: str | os.PathLike[str], *, verify_hashes: bool = True
) -> Packed:
  """Opens a packed folder and refuses a damaged one.

  Args:
    path: the folder.
    verify_hashes: read every file and compare its SHA-256 (about 1 GB/s);
      otherwise only sizes, counts and offsets are compared.

  Raises:
    ValueError: naming the file that is missing, truncated or changed.
  """
  path = pathlib.Path(path)
  manifest = _read_manifest(path / "manifest.json")
  tokenizer = load_tokenizer(path / "tokenizer.json")
  expected = manifest["tokenizer"]["sha256"]
  if tokenizer.sha256 != expected:
    raise ValueError(
      f"{path / 'tokenizer.json'}: sha256 {tokenizer.sha256}, the manifest"
      f" says {expected}"
    )
  dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
  tokens, offsets = {}, {}
  for split in SPLITS:
    entry = manifest["splits"][split]
    for name, recorded in entry["files"].items():
      _check_file(path / name, recorded, verify_hashes)
    tokens[split] = _map(path / _tokens_name(split), dtype)
    offsets[split] = _map(path / _offsets_name(split), np.dtype("<i8"))
    _check_split(path, split, tokens[split], offsets[split], entry)
    if verify_hashes:
      name = path / _tokens_name(split)
      _check_ids(name, tokens[split], tokenizer.vocab_size)
  return Packed(path, manifest, tokenizer, tokens, offsets)


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
    "dtype": _token_dtype(tokenizer.vocab_size).name,
  }


def _token_dtype(vocab_size: int) -> np.dtype:
  return np.dtype("uint16" if vocab_size < 65536 else "uint32")


def _tokens_name(split: str) -> str:
  return f"{split}.tokens.bin"


def _offsets_name(split: str) -> str:
  return f"{split}.offsets.bin"


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
  dtype = _token_dtype(tokenizer.vocab_size).newbyteorder("<")
  counts = dict.fromkeys(_COUNTS, 0)
  offsets = [0]
  digest = hashlib.sha256()
  with open(folder / _tokens_name(split), "wb") as file:
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
        counts["predicted_bytes"] += size - len(tokenizer.token_bytes(ids[0]))
    file.flush()
    os.fsync(file.fileno())
  counts["documents"] = len(offsets) - 1
  counts["tokens"] = offsets[-1]
  data = np.asarray(offsets, "<i8").tobytes()
  files.write_synced(folder / _offsets_name(split), data)
  return counts | {
    "files": {
      _tokens_name(split): {
        "size": offsets[-1] * dtype.itemsize,
        "sha256": digest.hexdigest(),
      },
      _offsets_name(split): {
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
  found = _identity(packed.manifest)
  for name, value in _identity(header).items():
    if found[name] != value:
      raise ValueError(
        f"{path}: already holds other data, {name} is {found[name]!r} and not"
        f" {value!r}; remove it or choose another folder"
      )
  return packed


def _identity(manifest: dict[str, Any]) -> dict[str, Any]:
  """What decides the bytes of a packed folder."""
  names = ("corpus_sha256", "seed", "validation_fraction")
  tokenizer = {"tokenizer sha256": manifest["tokenizer"]["sha256"]}
  return {name: manifest[name] for name in names} | tokenizer


def _read_manifest(path: pathlib.Path) -> dict[str, Any]:
  if not path.is_file():
    raise ValueError(f"{path}: missing, so this is not a packed folder")
  try:
    manifest = json.loads(path.read_bytes())
    if manifest["format"] != FORMAT or manifest["version"] != VERSION:
      raise ValueError(
        f"format {manifest['format']!r} version {manifest['version']!r},"
        f" expected {FORMAT!r} version {VERSION}"
      )
    if manifest["dtype"] not in ("uint16", "uint32"):
      raise ValueError(f"dtype {manifest['dtype']!r}")
    _identity(manifest)
    for split in SPLITS:
      entry = manifest["splits"][split]
      for count in _COUNTS:
        if not isinstance(entry[count], int) or entry[count] < 0:
          raise ValueError(f"{split} {count} is {entry[count]!r}")
      # Fixed names: a manifest must not point outside its folder.
      if set(entry["files"]) != {_tokens_name(split), _offsets_name(split)}:
        raise ValueError(f"{split} files are {sorted(entry['files'])}")
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f"{path}: not a valid manifest: {error}") from error
  return manifest


def _check_file(
  path: pathlib.Path, recorded: dict[str, Any], verify_hashes: bool
) -> None:
  if not path.is_file():
    raise ValueError(f"{path}: missing")
  size = path.stat().st_size
  if size != recorded["size"]:
    raise ValueError(
      f"{path}: {size} bytes, the manifest says {recorded['size']}"
    )
  if verify_hashes and (found := files.sha256_file(path)) != recorded["sha256"]:
    raise ValueError(
      f"{path}: sha256 {found}, the manifest says {recorded['sha256']}"
    )


def _check_split(
  path: pathlib.Path,
  split: str,
  tokens: np.ndarray,
  offsets: np.ndarray,
  entry: dict[str, Any],
) -> None:
  name = path / _offsets_name(split)
  if len(offsets) != entry["documents"] + 1 or offsets[0] != 0:
    raise ValueError(f"{name}: not {entry['documents']} documents from 0 on")
  if offsets[-1] != len(tokens) or len(tokens) != entry["tokens"]:
    raise ValueError(
      f"{name}: ends at {offsets[-1]}, {_tokens_name(split)} holds"
      f" {len(tokens)} tokens, the manifest says {entry['tokens']}"
    )
  if not np.all(np.diff(offsets) > 0):
    raise ValueError(f"{name}: offsets do not increase")


def _check_ids(path: pathlib.Path, ids: np.ndarray, vocab_size: int) -> None:
  if ids.size and (largest := int(ids.max())) >= vocab_size:
    raise ValueError(
      f"{path}: holds id {largest}, the tokenizer has {vocab_size}"
    )


def _map(path: pathlib.Path, dtype: np.dtype) -> np.ndarray:
  if path.stat().st_size == 0:  # an empty file cannot be mapped
    return np.zeros(0, dtype)
  return np.memmap(path, dtype, mode="r")
