"""Headers of safetensors files: the library's checks, and three it lacks."""

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Callable

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from gdn2_jax.interop.disk import PICKLES, parse_json, regular_size

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
_PICKLED = (b"PK\x03\x04", b"\x80\x02", b"\x80\x04")  # zip; protocols 2 and 4


@dataclasses.dataclass(frozen=True)
class Lazy:
  """A tensor that is not read yet; `np.asarray` reads it."""

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]
  path: pathlib.Path | None = None  # file that holds it as it is

  @property
  def nbytes(self) -> int:
    """Bytes of the tensor."""
    return math.prod(self.shape) * self.dtype.itemsize

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    assert copy is not False
    value = self.read()
    if (value.shape, value.dtype) != (self.shape, self.dtype):
      raise ValueError(f"{self.path}: changed while it was read")
    return value if dtype is None else value.astype(dtype)


@dataclasses.dataclass(frozen=True)
class Header:
  """Metadata of a file, and its tensors by name in the order of their bytes."""

  metadata: dict[str, str]
  tensors: dict[str, Lazy]


def read_header(path: str | os.PathLike) -> Header:
  """Reads and checks the header of one safetensors file, but no tensor.

  Raises:
    FileNotFoundError: no such file.
    ValueError: a pickle, not such a file, truncated, with bytes left over, or
      with tensors that overlap, leave holes, repeat or have unknown dtypes.
  """
  path = pathlib.Path(path)
  regular_size(path)
  if path.suffix.lower() in PICKLES:
    _refuse_pickle(path)
  tensors = {}
  with open(path, "rb") as file:
    start = file.read(8)
    try:
      with safe_open(path, framework="np") as opened:
        metadata = opened.metadata() or {}
        for name in opened.offset_keys():
          found = opened.get_slice(name)
          dtype, shape = found.get_dtype(), tuple(found.get_shape())
          if dtype not in DTYPES:
            raise ValueError(
              f"{path}: tensor {name!r}: dtype {dtype}, expected "
              + ", ".join(DTYPES)
            )
          read = functools.partial(_read, path, name)
          tensors[name] = Lazy(shape, DTYPES[dtype], read, path)
    except SafetensorError as e:
      # Only now: a header's length may begin with the same bytes.
      if start.startswith(_PICKLED):
        _refuse_pickle(path)
      raise ValueError(
        f"{path}: not a safetensors file, or a damaged one (truncated, or "
        f"something was added): {e}"
      ) from e
    # The library keeps the last of several tensors of one name.
    parse_json(file.read(int.from_bytes(start, "little")), path)
  return Header(metadata, tensors)


def _read(path: pathlib.Path, name: str) -> np.ndarray:
  try:
    with safe_open(path, framework="np") as file:
      return file.get_tensor(name)
  except (SafetensorError, ValueError) as e:  # NumPy refuses 65 axes
    raise ValueError(f"{path}: {e}") from e


def _refuse_pickle(path: pathlib.Path) -> None:
  target = path.with_suffix(".safetensors")
  raise ValueError(
    f"{path}: a pickle, which may run code, refused. Where you trust it, "
    'convert it with torch: python -c "import torch; from safetensors.torch '
    f"import save_file; d = torch.load({str(path)!r}, map_location='cpu', "
    "weights_only=True); d = d.get('model', d); save_file({k: "
    f'v.contiguous().clone() for k, v in d.items()}}, {str(target)!r})"'
  )
