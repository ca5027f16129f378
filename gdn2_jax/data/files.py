"""Files that are either whole or absent.

Everything the data package leaves on disk is written beside its final name,
flushed to the device and then renamed, so that a killed or concurrent builder
can never leave a file that looks finished and is not.
"""

import hashlib
import os
import pathlib
import shutil
import socket
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


def sync_folder(path: pathlib.Path) -> None:
  """Flushes the entries of a folder, so that a rename survives a crash."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def write_synced(path: pathlib.Path, data: bytes) -> None:
  """Writes a new file and flushes it; the caller owns the renaming."""
  with open(path, "wb") as file:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def write_atomic(path: pathlib.Path, data: bytes) -> None:
  """Replaces `path` by `data` in one step: temporary, fsync, rename, fsync."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = _temporary_name(path)
  try:
    write_synced(temporary, data)
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
  sync_folder(path.parent)


def open_staging(path: pathlib.Path) -> pathlib.Path:
  """Makes an empty folder beside `path` in which it can be built.

  Staging folders of builders on this host that no longer run are removed
  first: a killed build costs disk space until the next one, never more.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  _remove_abandoned(path)
  staging = _temporary_name(path)
  staging.mkdir()
  return staging


def publish(staging: pathlib.Path, path: pathlib.Path) -> bool:
  """Renames a finished staging folder to `path`.

  Args:
    staging: a folder from `open_staging`, its files already flushed.
    path: the final name; may exist as an empty folder.

  Returns:
    False where another builder got there first; `staging` is then removed and
    `path` is left as it is.
  """
  sync_folder(staging)
  try:
    os.rename(staging, path)
  except OSError:
    if not path.exists():
      raise
    shutil.rmtree(staging)
    return False
  sync_folder(path.parent)
  return True


def _temporary_name(path: pathlib.Path) -> pathlib.Path:
  host = socket.gethostname().replace(".", "-")
  tag = uuid.uuid4().hex[:8]
  return path.parent / f".{path.name}.tmp.{host}.{os.getpid()}.{tag}"


def _remove_abandoned(path: pathlib.Path) -> None:
  host = socket.gethostname().replace(".", "-")
  prefix = f".{path.name}.tmp.{host}."
  for entry in path.parent.iterdir():
    if not entry.name.startswith(prefix):
      continue
    pid = entry.name[len(prefix) :].partition(".")[0]
    if pid.isdigit() and not _is_running(int(pid)):
      if entry.is_dir():
        shutil.rmtree(entry, ignore_errors=True)
      else:
        entry.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    return True
  return True
