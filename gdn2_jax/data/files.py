"""Atomic writes and SHA-256 of files.

A file is written beside its final name, flushed to the device and then
renamed, so that a process that is killed, or two at a time, never leave a file
that looks finished and is not.
"""

import hashlib
import os
import pathlib
import uuid

_HASH_BLOCK = 1 << 20


def sha256_bytes(data: bytes) -> str:
  """Hex SHA-256 of a byte string."""
  return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | os.PathLike[str]) -> str:
  """Hex SHA-256 of a file, read in blocks of 1 MiB."""
  digest = hashlib.sha256()
  with open(path, "rb") as file:
    while block := file.read(_HASH_BLOCK):
      digest.update(block)
  return digest.hexdigest()


def sync_folder(path: str | os.PathLike[str]) -> None:
  """Flushes the entries of a folder, so that a rename survives a crash."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
  """Replaces a file in one step: temporary file, fsync, rename, fsync.

  Folders above `path` are made. A killed process may leave the temporary file,
  `.NAME.tmp.TAG`, beside it.

  Raises:
    OSError: if it cannot be written; `path` is then as it was.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.parent / f".{path.name}.tmp.{uuid.uuid4().hex[:8]}"
  try:
    with open(temporary, "wb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
  sync_folder(path.parent)
