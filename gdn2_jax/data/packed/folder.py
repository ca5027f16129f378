"""The folder of packed rows: its files, and opening it without trusting it.

A packed folder holds, for each split, the tokens of all documents end to end
and where each begins, plus the tokenizer and a manifest with the hash of
every file:

  manifest.json      format, counts, hashes, tokenizer, origin of the text
  tokenizer.json     see `gdn2_jax.data.tokenizer`
  SPLIT.tokens.bin   little-endian uint16 (uint32 from 65536 ids on)
  SPLIT.offsets.bin  little-endian int64 [documents + 1], first token of each

SPLIT is "train" or "validation". That is version 1, one file per split, which
`gdn2_jax.data.build.in_memory` makes of a corpus. Version 2 has shards,
SPLIT-00000.tokens.bin and so on, which `gdn2_jax.data.build` makes of any
amount of text. Every document ends with the tokenizer's EOS and empty ones are
left out. `gdn2_jax.data.packed.rows` reads rows of any length from either.
"""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np

from gdn2_jax.data import files
from gdn2_jax.data.packed import arrays
from gdn2_jax.data.tokenizer.api import Tokenizer, load_tokenizer

FORMAT = "gdn2-packed-rows"
VERSION = 1
SHARDED_VERSION = 2
SPLITS = ("train", "validation")
EOS_POLICY = "one EOS after every document; the target after it is masked"
BOS_POLICY = "none"
COUNTS = ("documents", "empty_documents", "tokens", "bytes", "predicted_bytes")


@dataclasses.dataclass(frozen=True)
class Packed:
  """An open packed folder; arrays are read-only memory maps.

  Attributes:
    path: the folder.
    manifest: the content of manifest.json.
    tokenizer: the tokenizer the tokens were made with.
    tokens: split -> uint16 or uint32 [tokens], one array or shards.
    offsets: split -> int64 [documents + 1], one array or shards.
  """

  path: pathlib.Path
  manifest: dict[str, Any]
  tokenizer: Tokenizer
  tokens: dict[str, arrays.Tokens]
  offsets: dict[str, arrays.Offsets]

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
  manifest = read_manifest(path / "manifest.json")
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
    tokens[split], offsets[split] = _map_split(path, split, dtype, entry)
    _check_split(
      path, split, tokens[split], offsets[split], entry, verify_hashes
    )
    if verify_hashes:
      for name, part in zip(
        file_names(split, entry, "tokens"), _parts(tokens[split]), strict=True
      ):
        _check_ids(path / name, part, tokenizer.vocab_size)
  return Packed(path, manifest, tokenizer, tokens, offsets)


def file_names(split: str, entry: dict[str, Any], kind: str) -> list[str]:
  """Files of a split, in order; `kind` is "tokens" or "offsets"."""
  if "shards" not in entry:
    return [f"{split}.{kind}.bin"]
  return [arrays.shard_name(split, i, kind) for i in range(entry["shards"])]


def token_dtype(vocab_size: int) -> np.dtype:
  """The smallest type of a token file that holds every id."""
  return np.dtype("uint16" if vocab_size < 65536 else "uint32")


def read_manifest(path: pathlib.Path) -> dict[str, Any]:
  """Reads a manifest.json and checks everything that is used of it.

  Raises:
    ValueError: naming the file and what is wrong with it.
  """
  if not path.is_file():
    raise ValueError(f"{path}: missing, so this is not a packed folder")
  try:
    manifest = json.loads(path.read_bytes())
    versions = (VERSION, SHARDED_VERSION)
    if manifest["format"] != FORMAT or manifest["version"] not in versions:
      raise ValueError(
        f"format {manifest['format']!r} version {manifest['version']!r},"
        f" expected {FORMAT!r} version {VERSION} or {SHARDED_VERSION}"
      )
    if manifest["dtype"] not in ("uint16", "uint32"):
      raise ValueError(f"dtype {manifest['dtype']!r}")
    identity(manifest)
    for split in SPLITS:
      _check_entry(split, manifest["splits"][split], manifest["version"])
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f"{path}: not a valid manifest: {error}") from error
  return manifest


def identity(manifest: dict[str, Any]) -> dict[str, Any]:
  """What decides the bytes of a packed folder."""
  if manifest["version"] == SHARDED_VERSION:
    return {"plan sha256": manifest["plan_sha256"]}
  names = ("corpus_sha256", "seed", "validation_fraction")
  tokenizer = {"tokenizer sha256": manifest["tokenizer"]["sha256"]}
  return {name: manifest[name] for name in names} | tokenizer


def _check_entry(split: str, entry: dict[str, Any], version: int) -> None:
  counts = COUNTS if version == VERSION else (*COUNTS, "shards")
  for count in counts:
    if not isinstance(entry[count], int) or entry[count] < 0:
      raise ValueError(f"{split} {count} is {entry[count]!r}")
  # Fixed names: a manifest must not point outside its folder.
  expected = {
    name
    for kind in ("tokens", "offsets")
    for name in file_names(split, entry, kind)
  }
  if set(entry["files"]) != expected:
    raise ValueError(f"{split} files are {sorted(entry['files'])}")


def _map_split(
  path: pathlib.Path, split: str, dtype: np.dtype, entry: dict[str, Any]
) -> tuple[arrays.Tokens, arrays.Offsets]:
  paths = {
    kind: [path / name for name in file_names(split, entry, kind)]
    for kind in ("tokens", "offsets")
  }
  if "shards" not in entry:
    return (
      arrays.map_file(paths["tokens"][0], dtype),
      arrays.map_file(paths["offsets"][0], np.dtype("<i8")),
    )
  tokens = arrays.ShardedTokens(paths["tokens"], dtype)
  return tokens, arrays.ShardedOffsets(paths["offsets"], tokens.starts)


def _parts(array: arrays.Tokens | arrays.Offsets) -> list[np.ndarray]:
  return [array] if isinstance(array, np.ndarray) else array.parts


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


def _check_split(
  path: pathlib.Path,
  split: str,
  tokens: arrays.Tokens,
  offsets: arrays.Offsets,
  entry: dict[str, Any],
  thorough: bool,
) -> None:
  names = file_names(split, entry, "offsets")
  parts = list(zip(_parts(tokens), _parts(offsets), names, strict=True))
  documents = sum(len(part) - 1 for _, part, _ in parts)
  if documents != entry["documents"] or any(
    len(part) == 0 or part[0] != 0 for _, part, _ in parts
  ):
    raise ValueError(
      f"{path / names[0]}: not {entry['documents']} documents from 0 on"
    )
  if len(tokens) != entry["tokens"]:
    raise ValueError(
      f"{path / names[0]}: {split} holds {len(tokens)} tokens, the manifest"
      f" says {entry['tokens']}"
    )
  for part_tokens, part, name in parts:
    if part[-1] != len(part_tokens):
      raise ValueError(
        f"{path / name}: ends at {part[-1]} of {len(part_tokens)} tokens"
      )
    # As long as the file of a version 1, read in full either way.
    if (thorough or "shards" not in entry) and not np.all(np.diff(part) > 0):
      raise ValueError(f"{path / name}: offsets do not increase")


def _check_ids(path: pathlib.Path, ids: np.ndarray, vocab_size: int) -> None:
  if ids.size and (largest := int(ids.max())) >= vocab_size:
    raise ValueError(
      f"{path}: holds id {largest}, the tokenizer has {vocab_size}"
    )
