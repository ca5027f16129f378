"""Rows of results in a JSON Lines file that an interrupted run continues.

FOLDER/settings.json  what decides the rows; another run must agree with it
FOLDER/rows.jsonl     one object per line, in the order they were computed
"""

import fcntl
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from gdn2_jax.files import write_atomically

SETTINGS, ROWS = "settings.json", "rows.jsonl"
_KEY = "key"  # field of a row that names it


class RowStore:
  """Rows by key, kept in a folder or, without one, in memory.

  Each `add` is on the disk before it returns. A line that a killed process
  left unfinished is removed when the folder is opened again. One process at a
  time may have a folder open.

    with RowStore("out", {"samples": 500}) as store:
      for key in keys:
        if key not in store:
          store.add(key, {"score": compute(key)})
      rows = list(store.rows())

  Args:
    folder: made if it does not exist; None keeps rows in memory.
    settings: JSON values that decide the rows, by name.
    name: of the folder in error messages.

  Raises:
    ValueError: the folder was begun with other settings, which are named; it
      holds a damaged file; or another process has it open.
    OSError: it cannot be read or written.
  """

  def __init__(
    self,
    folder: str | os.PathLike[str] | None,
    settings: Mapping[str, Any],
    *,
    name: str = "--out",
  ):
    self._keys: set[str] = set()
    self._in_memory: list[dict[str, Any]] = []
    self._file = None
    if folder is None:
      return
    self._path = pathlib.Path(folder) / ROWS
    self._path.parent.mkdir(parents=True, exist_ok=True)
    self._file = open(self._path, "a+b")  # noqa: SIM115, closed by `close`
    try:
      self._lock(f"{name}={folder}")
      settings_file = self._path.parent / SETTINGS
      if self._path.stat().st_size and not settings_file.exists():
        raise ValueError(
          f"{name}={folder}: has {ROWS} but no {SETTINGS}, which tells what "
          "they are: expected a new folder"
        )
      _agree(settings_file, settings, f"{name}={folder}")
      self._remove_unfinished()
      for row in self.rows():
        self._keys.add(row[_KEY])
    except BaseException:
      self.close()
      raise

  def __enter__(self) -> "RowStore":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def __contains__(self, key: str) -> bool:
    return key in self._keys

  def __len__(self) -> int:
    return len(self._keys)

  def add(self, key: str, row: Mapping[str, Any]) -> None:
    """Adds a row of JSON values under a key that no other row has."""
    if key in self._keys:
      raise ValueError(f"key={key!r}: there is a row of this key already")
    line = {_KEY: key, **row}
    # Strict JSON has no NaN, and other programs could not read it.
    data = json.dumps(line, allow_nan=False) + "\n"
    if self._file is None:
      self._in_memory.append(json.loads(data))
    else:
      self._file.write(data.encode())
      self._file.flush()
      os.fsync(self._file.fileno())
    self._keys.add(key)

  def rows(self) -> Iterator[dict[str, Any]]:
    """All rows with their "key", one at a time, in the order of `add`."""
    if self._file is None:
      yield from self._in_memory
      return
    with open(self._path, "rb") as file:
      for number, line in enumerate(file, 1):
        try:
          row = json.loads(line)
          valid = isinstance(row, dict) and isinstance(row.get(_KEY), str)
        except ValueError:
          valid = False
        if not valid:
          raise ValueError(
            f"{self._path}: line {number} is damaged: expected a JSON object "
            f"with a {_KEY}; remove the line to compute its row again"
          )
        yield row

  def close(self) -> None:
    """Closes the file, so that another process may open the folder."""
    if self._file is not None:
      self._file.close()

  def _lock(self, name: str) -> None:
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ValueError(f"{name}: another process writes to it") from None

  def _remove_unfinished(self) -> None:
    """Removes what follows the last end of a line."""
    size, end = self._path.stat().st_size, end_of_lines(self._file)
    if end < size:
      self._file.truncate(end)


def end_of_lines(file: BinaryIO) -> int:
  """Position after the last complete line of a file that is open to read."""
  end = file.seek(0, os.SEEK_END)
  while end:
    start = max(0, end - 65536)
    file.seek(start)
    newline = file.read(end - start).rfind(b"\n")
    if newline >= 0:
      return start + newline + 1
    end = start
  return 0


def _agree(path: pathlib.Path, settings: Mapping[str, Any], name: str) -> None:
  """Writes the settings of a new folder, or compares those of an old one."""
  settings = json.loads(json.dumps(settings, allow_nan=False))
  if not path.exists():
    data = json.dumps(settings, indent=2) + "\n"
    write_atomically(path, data.encode())
    return
  try:
    found = json.loads(path.read_bytes())
  except ValueError as error:
    raise ValueError(f"{path}: damaged: {error}") from None
  if not isinstance(found, dict):
    raise ValueError(f"{path}: damaged: expected a JSON object")
  for key in sorted(found.keys() | settings.keys()):
    if found.get(key) != settings.get(key):
      raise ValueError(
        f"{name}: was begun with {key}={found.get(key)!r}, now "
        f"{key}={settings.get(key)!r}: expected the same, or a new folder"
      )
