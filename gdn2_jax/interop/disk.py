"""Files of others, checked before use: their kind, size and JSON."""

import json
import os
import pathlib
import re
import stat
from collections.abc import Iterable
from typing import Any

# Endings of files that can run code when they are read.
PICKLES = (
  ".bin",
  ".ckpt",
  ".joblib",
  ".pickle",
  ".pkl",
  ".pt",
  ".pth",
  ".tar",
)
_MAX_JSON_BYTES = 64 << 20


def read_json(path: str | os.PathLike) -> dict[str, Any]:
  """A JSON object from a file of at most 64 MiB."""
  path = pathlib.Path(path)
  size = regular_size(path)
  if size > _MAX_JSON_BYTES:
    raise ValueError(
      f"{path}: {size:,} bytes of JSON, expected at most {_MAX_JSON_BYTES:,}"
    )
  return parse_json(path.read_bytes(), path)


def json_bytes(tree: Any) -> bytes:
  """Indented JSON, as all files of a folder have it."""
  return (json.dumps(tree, indent=2) + "\n").encode()


def is_plain_name(name: Any) -> bool:
  """True for a name that cannot leave its folder."""
  return isinstance(name, str) and bool(
    re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name)
  )


def regular_size(path: pathlib.Path) -> int:
  """Bytes of a file; a folder or a device is refused."""
  if not path.exists():
    raise FileNotFoundError(f"{path}: no such file")
  found = path.stat()
  if not stat.S_ISREG(found.st_mode):
    raise ValueError(f"{path}: not a regular file")
  return found.st_size


def parse_json(data: bytes, path: pathlib.Path) -> dict[str, Any]:
  """A JSON object without repeated fields; `path` is for messages."""

  def no_repeats(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found = {}
    for key, value in pairs:
      if key in found:
        raise ValueError(f"{key!r} occurs twice")
      found[key] = value
    return found

  try:
    tree = json.loads(data.decode("utf-8"), object_pairs_hook=no_repeats)
  except (ValueError, RecursionError) as e:
    raise ValueError(f"{path}: unreadable header or JSON: {e}") from e
  if not isinstance(tree, dict):
    raise ValueError(f"{path}: expected a JSON object")
  return tree
