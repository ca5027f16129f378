"""SHA-256 of bytes and of files."""

import hashlib
import os
from collections.abc import Buffer

_BLOCK = 1 << 20


def sha256_bytes(data: Buffer) -> str:
  """Hex SHA-256 of a byte string, or of the bytes of an array."""
  return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | os.PathLike[str]) -> str:
  """Hex SHA-256 of a file, read in blocks of 1 MiB."""
  digest = hashlib.sha256()
  with open(path, "rb") as file:
    while block := file.read(_BLOCK):
      digest.update(block)
  return digest.hexdigest()
