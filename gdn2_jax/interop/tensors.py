"""Safetensors files and shards, read and written.

Nothing here unpickles. Links are followed: download caches are made of them.
"""

import json
import os
import pathlib
import struct
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from gdn2_jax.files import replacing, write_atomically
from gdn2_jax.interop.disk import PICKLES, is_plain_name, json_bytes, read_json
from gdn2_jax.interop.header import DTYPES, Lazy, read_header

INDEX_SUFFIX = ".safetensors.index.json"
SHARD_BYTES = 5_000_000_000


def open_tensors(path: str | os.PathLike) -> dict[str, Lazy]:
  """Tensors of a file or of the shards of an index, unread."""
  path = pathlib.Path(path)
  if not path.name.endswith(".json"):
    return read_header(path).tensors
  placed = _read_index(path)
  found = {}
  for shard in sorted(set(placed.values())):
    tensors = read_header(path.parent / shard).tensors
    expected = {name for name, where in placed.items() if where == shard}
    if wrong := sorted(expected ^ set(tensors)):
      raise ValueError(
        f"{path}: {shard} and the index disagree about {len(wrong)} tensors, "
        f"the first is {wrong[0]!r}"
      )
    found |= tensors
  return found


def load_tensors(
  path: str | os.PathLike, names: Collection[str] | None = None
) -> dict[str, np.ndarray]:
  """Reads tensors of a file, or of the shards of an index.

  Args:
    path: *.safetensors, or *.safetensors.index.json beside its shards.
    names: tensors to read; None reads all.

  Returns:
    NumPy arrays by name.

  Raises:
    FileNotFoundError: the file or a shard is missing.
    ValueError: as `read_header`, the index and its shards disagree, or a name
      is missing.
  """
  entries = open_tensors(path)
  wanted = entries if names is None else names
  missing = sorted(set(wanted) - set(entries))
  if missing:
    raise ValueError(f"{path}: no tensor {', '.join(map(repr, missing))}")
  return {name: np.asarray(entries[name]) for name in wanted}


def save_tensors(
  path: str | os.PathLike,
  tensors: Mapping[str, Any],
  metadata: Mapping[str, Any] | None = None,
) -> None:
  """Writes one file atomically; equal input gives equal bytes.

  Args:
    path: file to write; an existing one is replaced.
    tensors: arrays by name, any that `np.asarray` takes.
    metadata: text to store with them, by name.

  Raises:
    ValueError: a name, dtype or metadata value that the format cannot hold.
    OSError: it cannot be written: no such folder, a full disk, ...
  """
  path = pathlib.Path(path)
  arrays = {name: _storable(name, value) for name, value in tensors.items()}
  metadata = dict(metadata or {})
  for key, value in metadata.items():
    if not isinstance(key, str) or not isinstance(value, str):
      raise ValueError(f"metadata[{key!r}]={value!r}: expected text by name")
  with replacing(path) as temporary:
    temporary.touch()
    mode = temporary.stat().st_mode
    try:
      save_file(arrays, temporary, metadata=metadata or None)
    except SafetensorError as e:  # its name for a full disk
      raise OSError(f"{path}: cannot be written: {e}") from e
    os.chmod(temporary, mode)  # the library's files are for their owner alone
    with open(temporary, "r+b") as file:
      _sort_metadata(file)


def save_shards(
  folder: str | os.PathLike,
  tensors: Mapping[str, Any],
  metadata: Mapping[str, Any] | None = None,
  *,
  max_bytes: int = SHARD_BYTES,
) -> list[str]:
  """Writes model.safetensors, or shards and an index; returns their names."""
  if max_bytes < 1:
    raise ValueError(f"max_bytes={max_bytes}: expected >= 1")
  folder = pathlib.Path(folder)
  shards, held = [{}], 0
  for name, value in tensors.items():
    if shards[-1] and held + value.nbytes > max_bytes:
      shards.append({})
      held = 0
    shards[-1][name] = value
    held += value.nbytes
  if len(shards) == 1:
    save_tensors(folder / "model.safetensors", tensors, metadata)
    return ["model.safetensors"]
  placed, names = {}, []
  for i, shard in enumerate(shards):
    name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
    save_tensors(folder / name, shard, metadata)
    placed |= dict.fromkeys(shard, name)
    names.append(name)
  total = sum(value.nbytes for value in tensors.values())
  index = {"metadata": {"total_size": total}, "weight_map": placed}
  names.append("model" + INDEX_SUFFIX)
  write_atomically(folder / names[-1], json_bytes(index))
  return names


def find_weights(folder: str | os.PathLike) -> pathlib.Path:
  """The model.safetensors or index of a folder, or its only weights file."""
  folder = pathlib.Path(folder)
  names = ("model.safetensors", "model" + INDEX_SUFFIX)
  found = [folder / name for name in names if (folder / name).is_file()]
  if len(found) > 1:
    raise ValueError(f"{folder}: both {names[0]} and {names[1]}: expected one")
  if found:
    return found[0]
  pickles = [p for p in folder.iterdir() if p.suffix.lower() in PICKLES]
  if pickles:
    return min(pickles)  # refused by name, with the way to convert it
  others = list(folder.glob("*.safetensors"))
  if len(others) != 1:
    raise FileNotFoundError(f"{folder}: neither {names[0]} nor {names[1]}")
  return others[0]


def _read_index(path: pathlib.Path) -> dict[str, str]:
  placed = read_json(path).get("weight_map")
  if not isinstance(placed, dict) or not placed:
    raise ValueError(f"{path}: expected a weight_map of shards by tensor")
  for name, shard in placed.items():
    if not is_plain_name(shard) or not shard.endswith(".safetensors"):
      raise ValueError(
        f"{path}: weight_map[{name!r}]={shard!r}: expected the plain name of a "
        ".safetensors file in the same folder"
      )
  return placed


def _storable(name: Any, value: Any) -> np.ndarray:
  if not isinstance(name, str) or not name or name == "__metadata__":
    raise ValueError(
      f"tensors[{name!r}]: expected a name that is not empty or __metadata__"
    )
  # The library writes the memory of a strided array as if it were contiguous.
  array = np.asarray(value)
  array = np.ascontiguousarray(array).reshape(array.shape)
  if array.dtype not in DTYPES.values():
    raise ValueError(
      f"tensors[{name!r}]: dtype {array.dtype}, expected one of "
      + ", ".join(map(str, DTYPES.values()))
    )
  return array


def _sort_metadata(file: Any) -> None:
  """Orders the metadata, which the library writes in random order."""
  (length,) = struct.unpack("<Q", file.read(8))
  header = json.loads(file.read(length))
  if "__metadata__" in header:
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
  compact = json.dumps(header, ensure_ascii=False, separators=(",", ":"))
  data = compact.encode().ljust(length)
  assert len(data) == length, (len(data), length)
  file.seek(8)
  file.write(data)
