"""Atomic writes of files.

A file is written beside its final name, flushed to the device and then
renamed, so that a process that is killed, or two at a time, never leave a file
that looks finished and is not.
"""

import contextlib
import os
import pathlib
import re
import time
import uuid
from collections.abc import Iterator

_LEFTOVER_SECONDS = 600.0  # since the last byte: its writer is dead


def sync_folder(path: str | os.PathLike[str]) -> None:
  """Flushes the entries of a folder, so that a rename survives a crash."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
  """Replaces a file in one step: temporary file, fsync, rename, fsync.

  Folders above `path` are made.

  Raises:
    OSError: if it cannot be written; `path` is then as it was.
  """
  pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
  with replacing(path) as temporary:
    temporary.write_bytes(data)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """Name of a temporary file, which becomes `path` when the block ends.

  Where the block raises, `path` stays as it was. A killed process may leave
  the temporary file, `.NAME.tmp.TAG`, beside it.
  """
  path = pathlib.Path(path)
  temporary = path.with_name(f".{path.name}.tmp.{uuid.uuid4().hex[:8]}")
  try:
    yield temporary
    with open(temporary, "r+b") as file:
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
  sync_folder(path.parent)


def remove_leftovers(folder: str | os.PathLike[str], names: str) -> None:
  """Removes temporary files that killed writers left in a folder.

  Args:
    folder: folder to search; not its subfolders.
    names: regular expression of the names that were to be written.
  """
  # A temporary file may itself have been written through another one.
  leftover = re.compile(rf"\.{{1,2}}(?:{names})(?:\.tmp\.[0-9a-f]+){{1,2}}")
  with os.scandir(folder) as found:
    for entry in found:
      if not leftover.fullmatch(entry.name):
        continue
      with contextlib.suppress(FileNotFoundError):
        age = time.time() - entry.stat(follow_symlinks=False).st_mtime
        if age > _LEFTOVER_SECONDS:
          os.unlink(entry.path)
