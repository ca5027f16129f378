"""The header of a safetensors file, and every check it has to pass."""

import dataclasses
import math
import os
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from gdn2_jax.interop.disk import parse_json, regular_size

DTYPES = {
  "BOOL": np.dtype(np.bool_),
  "I8": np.dtype(np.int8),
  "I16": np.dtype(np.int16),
  "I32": np.dtype(np.int32),
  "I64": np.dtype(np.int64),
  "U8": np.dtype(np.uint8),
  "U16": np.dtype(np.uint16),
  "U32": np.dtype(np.uint32),
  "U64": np.dtype(np.uint64),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F32": np.dtype(np.float32),
  "F64": np.dtype(np.float64),
}

_MAX_HEADER_BYTES = 100_000_000  # the library's own limit
_MAX_RANK = 32
_PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle", ".tar")


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor of a file, not read yet; `np.asarray(entry)` reads it.

  Attributes:
    path: of the file.
    name: in the file.
    dtype: of the tensor.
    shape: of the tensor.
    start, end: its bytes, counted from the end of the header.
  """

  path: pathlib.Path
  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  start: int
  end: int

  @property
  def nbytes(self) -> int:
    """Bytes of the tensor."""
    return self.end - self.start

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    assert copy is not False
    try:
      with safetensors.safe_open(self.path, framework="np") as file:
        value = file.get_tensor(self.name)
    except safetensors.SafetensorError as e:
      raise ValueError(f"{self.path}: {e}") from e
    if (value.shape, value.dtype) != (self.shape, self.dtype):
      raise ValueError(f"{self.path}: changed while it was read")
    return value if dtype is None else value.astype(dtype)


@dataclasses.dataclass(frozen=True)
class Header:
  """What a file says about itself, checked against its size.

  Attributes:
    metadata: text by name.
    tensors: by name, in the order of their bytes.
  """

  metadata: dict[str, str]
  tensors: dict[str, Entry]


def read_header(path: str | os.PathLike) -> Header:
  """Reads and checks the header of one safetensors file.

  Raises:
    FileNotFoundError: no such file.
    ValueError: a pickle, not such a file, truncated, with bytes left over, or
      with tensors that overlap, leave holes, repeat or have unknown dtypes.
  """
  path = pathlib.Path(path)
  size = regular_size(path)
  with open(path, "rb") as file:
    start = file.read(8)
    length = int.from_bytes(start, "little")
    is_header = len(start) == 8 and length <= min(_MAX_HEADER_BYTES, size - 8)
    _refuse_pickle(path, b"" if is_header else start)
    if not is_header:
      raise ValueError(
        f"{path}: not a safetensors file, or a truncated one: a header of "
        f"{length:,} bytes in a file of {size:,}"
      )
    header = parse_json(file.read(length), path)
  metadata = header.pop("__metadata__", {})
  if not isinstance(metadata, dict) or not all(
    isinstance(value, str) for value in metadata.values()
  ):
    raise ValueError(f"{path}: __metadata__: expected text by name")
  entries = [_entry(path, name, value) for name, value in header.items()]
  entries.sort(key=lambda entry: (entry.start, entry.end))
  end = 0
  for entry in entries:
    if entry.start != end:
      raise ValueError(
        f"{path}: tensor {entry.name!r} starts at byte {entry.start}, expected "
        f"{end}: overlapping tensors or a hole"
      )
    end = entry.end
  if end != size - 8 - length:
    raise ValueError(
      f"{path}: {size - 8 - length:,} bytes of tensors, the header describes "
      f"{end:,}: truncated, or something was added"
    )
  return Header(metadata, {entry.name: entry for entry in entries})


def _refuse_pickle(path: pathlib.Path, start: bytes) -> None:
  """PyTorch's files are pickles, alone or in a zip: reading one runs code."""
  pickled = start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04"))
  if not pickled and path.suffix.lower() not in _PICKLES:
    return
  target = path.with_suffix(".safetensors")
  raise ValueError(
    f"{path}: a pickle, which may run code, refused. Where you trust it, "
    'convert it with torch: python -c "import torch; from safetensors.torch '
    f"import save_file; d = torch.load({str(path)!r}, map_location='cpu', "
    "weights_only=True); d = d.get('model', d); save_file({k: "
    f'v.contiguous().clone() for k, v in d.items()}}, {str(target)!r})"'
  )


def _entry(path: pathlib.Path, name: str, value: Any) -> Entry:
  where = f"{path}: tensor {name!r}"
  if not isinstance(value, dict) or set(value) != {
    "dtype",
    "shape",
    "data_offsets",
  }:
    raise ValueError(f"{where}: expected dtype, shape and data_offsets")
  dtype, shape = value["dtype"], value["shape"]
  offsets = value["data_offsets"]
  if not isinstance(dtype, str) or dtype not in DTYPES:
    raise ValueError(f"{where}: dtype {dtype!r}, expected {', '.join(DTYPES)}")
  if not _are_sizes(shape) or len(shape) > _MAX_RANK:
    raise ValueError(f"{where}: shape {shape!r}")
  if not _are_sizes(offsets) or len(offsets) != 2:
    raise ValueError(f"{where}: data_offsets {offsets!r}")
  nbytes = math.prod(shape) * DTYPES[dtype].itemsize
  if offsets[1] - offsets[0] != nbytes:
    raise ValueError(
      f"{where}: {dtype}{shape} takes {nbytes} bytes, data_offsets {offsets}"
    )
  return Entry(path, name, DTYPES[dtype], tuple(shape), *offsets)


def _are_sizes(value: Any) -> bool:
  return isinstance(value, list) and all(
    type(size) is int and 0 <= size < 2**63 for size in value
  )
