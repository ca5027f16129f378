"""Tensors that are computed when somebody reads them.

A model goes through here one tensor at a time: nothing is read before every
name and shape has been checked, and nothing stays behind.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from gdn2_jax.interop.names import DIALECTS, FLOAT32, Dialect, Move

_SHOWN = 6


@dataclasses.dataclass(frozen=True)
class Lazy:
  """Shape and dtype of a tensor, and how to read it; `np.asarray` does.

  Attributes:
    shape: of the tensor.
    dtype: of the tensor.
    read: gives it, anew with every call.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]

  @property
  def nbytes(self) -> int:
    """Bytes of the tensor."""
    return math.prod(self.shape) * self.dtype.itemsize

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    value = self.read()
    assert (value.shape, value.dtype) == (self.shape, self.dtype)
    return value if dtype is None else value.astype(dtype)


Tensors = Mapping[str, Any]  # arrays, Lazy, or other things that read lazily


def check_names(
  found: Collection[str], expected: Collection[str], dialect: Dialect, path: Any
) -> None:
  """Refuses tensors too few or too many.

  Raises:
    ValueError: listing them, and naming the dialect that they look like.
  """
  found, expected = set(found), set(expected)
  missing, extra = sorted(expected - found), sorted(found - expected)
  if not missing and not extra:
    return
  if not dialect.recognises(found):
    for other in DIALECTS.values():
      if other.recognises(found):
        raise ValueError(
          f"{path}: these are names of the dialect {other.name!r}, not of "
          f"{dialect.name!r}; pass --from={other.name}"
        )
    layers = dialect.layer.partition("{}")[0]
    prefixes = {n[: n.find(layers)] for n in found if n.find(layers) > 0}
    if len(prefixes) == 1:
      raise ValueError(
        f"{path}: the names do not begin with {layers}; pass --strip_prefix="
        + prefixes.pop()
      )
  parts = []
  for what, names in (("missing", missing), ("unexpected", extra)):
    if names:
      more = len(names) - _SHOWN
      parts.append(
        f"{len(names)} {what}: "
        + ", ".join(names[:_SHOWN])
        + (f" and {more} more" if more > 0 else "")
      )
  raise ValueError(
    f"{path}: not the tensors of this model ({dialect.name}): "
    + "; ".join(parts)
  )


def to_ours(
  theirs: Tensors,
  moves: list[Move],
  shapes: Mapping[str, tuple[int, ...]],
  path: Any,
) -> dict[str, Lazy]:
  """Parameters of ours from tensors of theirs.

  Args:
    theirs: by name, exactly those of `moves`.
    moves: of the dialect and the model.
    shapes: of ours.
    path: of the file, for messages.

  Raises:
    ValueError: naming the first tensors whose shapes are not the model's.
  """
  wrong, ours = [], {}
  for move in moves:
    to_shapes = tuple(shapes[name] for name in move.ours)
    found = tuple(tuple(theirs[name].shape) for name in move.theirs)
    if not move.layout.accepts(to_shapes, found):
      expected = move.layout.theirs(to_shapes)
      wrong += [
        f"{name} {list(a)}, expected {list(b)}"
        for name, a, b in zip(move.theirs, found, expected, strict=True)
      ]
      continue
    dtype = theirs[move.theirs[0]].dtype
    for i, name in enumerate(move.ours):
      ours[name] = Lazy(
        to_shapes[i], np.dtype(dtype), _unpacker(theirs, move, to_shapes, i)
      )
  if wrong:
    more = len(wrong) - _SHOWN
    raise ValueError(
      f"{path}: {len(wrong)} tensors have other shapes than the config says: "
      + "; ".join(wrong[:_SHOWN])
      + (f"; and {more} more" if more > 0 else "")
    )
  return ours


def to_theirs(ours: Tensors, moves: list[Move]) -> dict[str, Lazy]:
  """Tensors of theirs from the parameters of ours.

  Raises:
    ValueError: parts of one tensor of theirs differ in dtype.
  """
  theirs = {}
  for move in moves:
    parts = [ours[name] for name in move.ours]
    dtypes = {np.dtype(part.dtype) for part in parts}
    if len(dtypes) > 1:
      raise ValueError(
        f"{', '.join(move.ours)}: dtypes {sorted(map(str, dtypes))}, but they "
        f"are one tensor {move.theirs[0]}; give --dtype"
      )
    shapes = move.layout.theirs(tuple(tuple(part.shape) for part in parts))
    for i, name in enumerate(move.theirs):
      theirs[name] = Lazy(shapes[i], *dtypes, _packer(ours, move, i))
  return theirs


def cast(tensor: Any, dtype: np.dtype) -> Lazy:
  """The same tensor in another dtype, or as it is."""
  found = Lazy(
    tuple(tensor.shape), np.dtype(tensor.dtype), lambda: np.asarray(tensor)
  )
  if found.dtype == dtype:
    return found
  return Lazy(found.shape, dtype, lambda: found.read().astype(dtype))


def in_dtype(ours: Tensors, dtype: str | None) -> dict[str, Lazy]:
  """Parameters of ours as a model holds them: A_log and dt_bias in float32.

  Args:
    ours: by name.
    dtype: of all the others, or None for those they have.
  """
  return {
    name: cast(
      tensor,
      np.dtype(np.float32)
      if name.split(".")[-1] in FLOAT32
      else np.dtype(tensor.dtype if dtype is None else jnp.dtype(dtype)),
    )
    for name, tensor in ours.items()
  }


def watched(tensor: Any, seen: Callable[[np.ndarray], None]) -> Lazy:
  """The same tensor; `seen` is shown what is read."""

  def read() -> np.ndarray:
    value = np.asarray(tensor)
    seen(value)
    return value

  return Lazy(tuple(tensor.shape), np.dtype(tensor.dtype), read)


# Functions, not closures in the loops: each binds its own move.


def _unpacker(theirs, move, shapes, i):
  def read():
    arrays = tuple(np.asarray(theirs[name]) for name in move.theirs)
    # A view would keep its whole tensor, and be copied when it is written.
    return np.ascontiguousarray(move.layout.unpack(arrays, shapes)[i])

  return read


def _packer(ours, move, i):
  def read():
    arrays = tuple(np.asarray(ours[name]) for name in move.ours)
    return np.ascontiguousarray(move.layout.pack(arrays)[i])

  return read
