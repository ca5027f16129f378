"""Packed folders: their files, and opening them without trusting them.

A packed folder holds, for each split, the tokens of all documents and where
each begins, in shards; plus the tokenizer and a manifest with the hash of
every file:

  manifest.json            format, counts, hashes, tokenizer, origin of the text
  tokenizer.json           see `gdn2_jax.data.tokenizer`
  SPLIT-00000.tokens.bin   little-endian uint16 (uint32 from 65536 ids on)
  SPLIT-00000.offsets.bin  little-endian int64 [documents of the shard + 1]

SPLIT is "train" or "validation". A shard holds whole documents; end to end the
shards of a split are one stream. Every document ends with the tokenizer's EOS
and empty ones are left out. `gdn2_jax.data.packed.rows` cuts it into rows of
any length.
"""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np

from gdn2_jax.data import files
from gdn2_jax.data.packed.arrays import ShardedOffsets, ShardedTokens
from gdn2_jax.data.tokenizer.api import Tokenizer, load_tokenizer

FORMAT = "gdn2-packed-rows"
VERSION = 2
SPLITS = ("train", "validation")
EOS_POLICY = "one EOS after every document; the target after it is masked"
BOS_POLICY = "none"
_COUNTS = (
  "documents",
  "empty_documents",
  "tokens",
  "bytes",
  "predicted_bytes",
  "shards",
)


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
  tokens: dict[str, ShardedTokens]
  offsets: dict[str, ShardedOffsets]

  def file_hashes(self) -> dict[str, str]:
    """SHA-256 of every token and offset file, by file name."""
    return {
      name: entry["sha256"]
      for split in SPLITS
      for name, entry in self.manifest["splits"][split]["files"].items()
    }


def open_packed(
  path: str | os.PathLike[str], *, verify_hashes: bool = True
) -> Packed:
  """Opens a packed folder and refuses a damaged one.

  Args:
    path: the folder.
    verify_hashes: read every file and compare its SHA-256 (about 1 GB/s and
      core); otherwise only sizes, counts and ends of offsets are compared.

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
  recorded = [
    (path / name, entry)
    for split in SPLITS
    for name, entry in manifest["splits"][split]["files"].items()
  ]
  _check_files(recorded, verify_hashes)
  dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
  tokens, offsets = {}, {}
  for split in SPLITS:
    entry = manifest["splits"][split]
    names = [path / n for n in _names(split, entry, "tokens")]
    tokens[split] = ShardedTokens(names, dtype)
    starts = tokens[split].starts
    names = [path / n for n in _names(split, entry, "offsets")]
    offsets[split] = ShardedOffsets(names, starts)
    _check_counts(path, split, tokens[split], offsets[split], entry)
    if verify_hashes:
      _check_values(
        path, split, tokens[split], offsets[split], tokenizer.vocab_size
      )
  return Packed(path, manifest, tokenizer, tokens, offsets)


def shard_name(split: str, index: int, kind: str) -> str:
  """File name of a shard: "train-00003.tokens.bin"; kind tokens or offsets."""
  return f"{split}-{index:05d}.{kind}.bin"


def _names(split: str, entry: dict[str, Any], kind: str) -> list[str]:
  return [shard_name(split, i, kind) for i in range(entry["shards"])]


def _read_manifest(path: pathlib.Path) -> dict[str, Any]:
  if not path.is_file():
    raise ValueError(f"{path}: missing, so this is not a packed folder")
  try:
    manifest = json.loads(path.read_bytes())
    if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
      raise ValueError(
        f"format {manifest['format']!r} version {manifest['version']!r},"
        f" expected {FORMAT!r} version {VERSION}; pack the text again"
      )
    if manifest["dtype"] not in ("uint16", "uint32"):
      raise ValueError(f"dtype {manifest['dtype']!r}")
    for split in SPLITS:
      _check_entry(split, manifest["splits"][split])
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f"{path}: not a valid manifest: {error}") from error
  return manifest


def _check_entry(split: str, entry: dict[str, Any]) -> None:
  for count in _COUNTS:
    if not isinstance(entry[count], int) or entry[count] < 0:
      raise ValueError(f"{split} {count} is {entry[count]!r}")
  # Fixed names: a manifest must not point outside its folder.
  expected = {
    name
    for kind in ("tokens", "offsets")
    for name in _names(split, entry, kind)
  }
  if set(entry["files"]) != expected:
    raise ValueError(f"{split} files are {sorted(entry['files'])}")


def _check_files(
  recorded: list[tuple[pathlib.Path, dict[str, Any]]], verify_hashes: bool
) -> None:
  for path, entry in recorded:
    if not path.is_file():
      raise ValueError(f"{path}: missing")
    size = path.stat().st_size
    if size != entry["size"]:
      raise ValueError(
        f"{path}: {size} bytes, the manifest says {entry['size']}"
      )
  if not verify_hashes:
    return
  # Hashing releases the interpreter's lock: threads use all cores.
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    found = pool.map(files.sha256_file, [path for path, _ in recorded])
    for (path, entry), digest in zip(recorded, found, strict=True):
      if digest != entry["sha256"]:
        raise ValueError(
          f"{path}: sha256 {digest}, the manifest says {entry['sha256']}"
        )


def _check_counts(
  path: pathlib.Path,
  split: str,
  tokens: ShardedTokens,
  offsets: ShardedOffsets,
  entry: dict[str, Any],
) -> None:
  for name, own, borders in zip(
    _names(split, entry, "offsets"), tokens.parts, offsets.parts, strict=True
  ):
    if len(borders) == 0 or borders[0] != 0 or borders[-1] != len(own):
      raise ValueError(
        f"{path / name}: not the borders of documents from 0 to {len(own)}"
      )
  found = {"tokens": len(tokens), "documents": len(offsets) - 1}
  for name, count in found.items():
    if count != entry[name]:
      raise ValueError(
        f"{path}: the {split} split holds {count} {name}, the manifest says"
        f" {entry[name]}"
      )


def _check_values(
  path: pathlib.Path,
  split: str,
  tokens: ShardedTokens,
  offsets: ShardedOffsets,
  vocab_size: int,
) -> None:
  """Refuses what a hash cannot see: wrong from the beginning."""
  for index, (own, borders) in enumerate(
    zip(tokens.parts, offsets.parts, strict=True)
  ):
    if not np.all(np.diff(borders) > 0):
      name = path / shard_name(split, index, "offsets")
      raise ValueError(f"{name}: offsets do not increase")
    if own.size and (largest := int(own.max())) >= vocab_size:
      name = path / shard_name(split, index, "tokens")
      raise ValueError(
        f"{name}: holds id {largest}, the tokenizer has {vocab_size}"
      )
