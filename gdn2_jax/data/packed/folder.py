"""Packed folders: files, manifest, and their verification.

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

from gdn2_jax import files
from gdn2_jax.data.packed.arrays import ShardedOffsets, ShardedTokens
from gdn2_jax.data.packed.rows import PackedRows
from gdn2_jax.data.tokenizer.api import Tokenizer, load_tokenizer

FORMAT = "gdn2-packed-rows"
VERSION = 2
SPLITS = ("train", "validation")
EOS_POLICY = "one EOS after every document; the target after it is masked"
BOS_POLICY = "none"
COUNTS = (  # of a split or a shard
  "documents",
  "empty_documents",
  "invalid_utf8_documents",
  "nul_documents",
  "long_documents",
  "tokens",
  "bytes",
  "predicted_bytes",
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

  def rows(
    self, split: str, seq_len: int, *, keep_partial: bool = False
  ) -> PackedRows:
    """Rows of a split by index; see `PackedRows`."""
    tokens, offsets = self.tokens[split], self.offsets[split]
    return PackedRows(tokens, offsets, seq_len, keep_partial)

  def files(self) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every token and offset file, by file name."""
    splits = self.manifest["splits"]
    return splits["train"]["files"] | splits["validation"]["files"]

  def file_hashes(self) -> dict[str, str]:
    """SHA-256 of every token and offset file, by file name."""
    return {name: entry["sha256"] for name, entry in self.files().items()}


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
  found = Packed(path, manifest, tokenizer, {}, {})
  _check_files(found, verify_hashes)
  dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
  for split in SPLITS:
    numbers = range(manifest["splits"][split]["shards"])
    tokens, offsets = (
      [path / shard_name(split, number, kind) for number in numbers]
      for kind in ("tokens", "offsets")
    )
    found.tokens[split] = ShardedTokens(tokens, dtype)
    starts = found.tokens[split].starts
    found.offsets[split] = ShardedOffsets(offsets, starts)
    _check_arrays(found, split, verify_hashes)
  return found


def shard_name(split: str, index: int, kind: str) -> str:
  """File name of a shard: "train-00003.tokens.bin"; kind tokens or offsets."""
  return f"{split}-{index:05d}.{kind}.bin"


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
  for count in (*COUNTS, "shards"):
    if not isinstance(entry[count], int) or entry[count] < 0:
      raise ValueError(f"{split} {count} is {entry[count]!r}")
  # Fixed names: a manifest must not point outside its folder.
  expected = {
    shard_name(split, index, kind)
    for kind in ("tokens", "offsets")
    for index in range(entry["shards"])
  }
  if set(entry["files"]) != expected:
    raise ValueError(f"{split} files are {sorted(entry['files'])}")


def _check_files(found: Packed, verify_hashes: bool) -> None:
  """Compares sizes and hashes of files with those in the manifest."""
  recorded = [(found.path / n, entry) for n, entry in found.files().items()]
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
    digests = pool.map(files.sha256_file, [path for path, _ in recorded])
    for (path, entry), digest in zip(recorded, digests, strict=True):
      if digest != entry["sha256"]:
        raise ValueError(
          f"{path}: sha256 {digest}, the manifest says {entry['sha256']}"
        )


def _check_arrays(found: Packed, split: str, verify_values: bool) -> None:
  """Compares arrays with counts, and values with what every build writes."""
  tokens, offsets = found.tokens[split], found.offsets[split]
  vocab_size = found.tokenizer.vocab_size
  for index, (own, borders) in enumerate(
    zip(tokens.parts, offsets.parts, strict=True)
  ):
    name = found.path / shard_name(split, index, "offsets")
    if len(borders) == 0 or borders[0] != 0 or borders[-1] != len(own):
      raise ValueError(
        f"{name}: not the borders of documents from 0 to {len(own)}"
      )
    # A hash cannot see what was wrong from the beginning.
    if verify_values and not np.all(np.diff(borders) > 0):
      raise ValueError(f"{name}: offsets do not increase")
    if verify_values and own.size and own.max() >= vocab_size:
      name = found.path / shard_name(split, index, "tokens")
      raise ValueError(
        f"{name}: holds id {own.max()}, the tokenizer has {vocab_size}"
      )
  for name, count in (("tokens", len(tokens)), ("documents", len(offsets) - 1)):
    if count != (expected := found.manifest["splits"][split][name]):
      raise ValueError(
        f"{found.path}: the {split} split holds {count} {name}, the manifest"
        f" says {expected}"
      )
