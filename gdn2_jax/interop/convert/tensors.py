"""Tensors that are computed when they are read.

A model is converted one tensor at a time: nothing is read before every name and
shape has been checked, and nothing stays in memory.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from gdn2_jax.interop.names import DIALECTS, FLOAT32, Dialect, Move
from gdn2_jax.interop.tree import listed

Tensors = Mapping[str, Any]  # by name: arrays, Entry, Lazy


@dataclasses.dataclass(frozen=True)
class Lazy:
  """Shape and dtype of a tensor, and a function that reads it."""

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


def check_names(
  found: Collection[str], expected: Collection[str], dialect: Dialect, path: Any
) -> None:
  """Refuses missing and unexpected tensors; names a likelier dialect."""
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
  raise ValueError(
    f"{path}: not the tensors of this model ({dialect.name}): "
    + "; ".join(
      f"{len(names)} {kind}: {listed(names)}"
      for kind, names in (("missing", missing), ("unexpected", extra))
      if names
    )
  )


def to_ours(
  theirs: Tensors,
  moves: list[Move],
  shapes: Mapping[str, tuple[int, ...]],
  path: Any,
) -> dict[str, Lazy]:
  """Parameters of ours, of these shapes, from tensors of theirs."""
  wrong, ours = [], {}
  for move in moves:
    tensor = theirs[move.theirs]
    to = tuple(shapes[name] for name in move.ours)
    if not move.layout.accepts(tuple(tensor.shape), *to):
      expected = move.layout.theirs(*to)
      wrong.append(
        f"{move.theirs} {list(tensor.shape)}, expected {list(expected)}"
      )
    for i, name in enumerate(move.ours):
      read = _unpacker(tensor, move, to, i)
      ours[name] = Lazy(to[i], np.dtype(tensor.dtype), read)
  if wrong:
    raise ValueError(
      f"{path}: {len(wrong)} tensors have other shapes than the config says: "
      + listed(wrong)
    )
  return ours


def to_theirs(ours: Tensors, moves: list[Move]) -> dict[str, Lazy]:
  """Tensors of theirs from the parameters of ours."""
  theirs = {}
  for move in moves:
    parts = [ours[name] for name in move.ours]
    dtypes = {np.dtype(part.dtype) for part in parts}
    if len(dtypes) > 1:
      raise ValueError(
        f"{', '.join(move.ours)}: dtypes {sorted(map(str, dtypes))}, but they "
        f"are one tensor {move.theirs}; give --dtype"
      )
    shape = move.layout.theirs(*(tuple(part.shape) for part in parts))
    theirs[move.theirs] = Lazy(shape, *dtypes, _packer(parts, move))
  return theirs


def in_dtype(ours: Tensors, dtype: str | None) -> dict[str, Lazy]:
  """Parameters in a dtype or their own; A_log and dt_bias in float32."""

  def wanted(name, tensor):
    if name.split(".")[-1] in FLOAT32:
      return np.dtype(np.float32)
    return np.dtype(tensor.dtype if dtype is None else jnp.dtype(dtype))

  return {
    name: _mapped(tensor, lambda x, to: x.astype(to, copy=False), to)
    for name, tensor in ours.items()
    for to in [wanted(name, tensor)]
  }


def watched(tensor: Any, seen: Callable[[np.ndarray], None]) -> Lazy:
  """The same tensor; `seen` gets the value whenever it is read."""

  def see(value, _):
    seen(value)
    return value

  return _mapped(tensor, see, np.dtype(tensor.dtype))


# Functions, not closures in the loops: each binds its own tensor.


def _mapped(tensor, function, dtype):
  def read():
    return function(np.asarray(tensor), dtype)

  return Lazy(tuple(tensor.shape), dtype, read)


def _unpacker(tensor, move, shapes, i):
  def read():
    # A view would keep its whole tensor, and be copied when it is written.
    return np.ascontiguousarray(
      move.layout.unpack(np.asarray(tensor), *shapes)[i]
    )

  return read


def _packer(parts, move):
  def read():
    return np.ascontiguousarray(move.layout.pack(*map(np.asarray, parts)))

  return read
