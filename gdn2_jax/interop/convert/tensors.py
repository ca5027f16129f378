"""Tensors that are computed when they are read.

A model is converted one tensor at a time: nothing is read before every name and
shape has been checked, and nothing stays in memory.
"""

import functools
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from gdn2_jax.interop.header import Lazy
from gdn2_jax.interop.names import DIALECTS, Dialect, Move
from gdn2_jax.interop.tree import float32_names, listed, name_differences
from gdn2_jax.model.config import ModelConfig

Tensors = Mapping[str, Any]  # by name: arrays or Lazy


def check_dialect(names: Collection[str], dialect: Dialect, path: Any) -> None:
  """Refuses names of another dialect, or behind a prefix."""
  if dialect.recognises(names):
    return
  for other in DIALECTS.values():
    if other.recognises(names):
      raise ValueError(
        f"{path}: these are names of the dialect {other.name!r}, not of "
        f"{dialect.name!r}; pass --from={other.name}"
      )
  layers = dialect.layer.partition("{}")[0]
  prefixes = {n[: n.find(layers)] for n in names if n.find(layers) > 0}
  raise ValueError(
    f"{path}: the names do not begin with {layers}"
    + "".join(f"; pass --strip_prefix={p}" for p in sorted(prefixes)[:1])
  )


def to_ours(
  theirs: Tensors,
  moves: list[Move],
  shapes: Mapping[str, tuple[int, ...]],
  path: Any,
) -> dict[str, Lazy]:
  """Parameters of ours, of these shapes, from tensors of theirs."""
  wrong = name_differences(theirs, [move.theirs for move in moves])
  ours = {}
  for move in moves:
    if move.theirs not in theirs:
      continue
    tensor = theirs[move.theirs]
    to = tuple(shapes[name] for name in move.ours)
    if not move.layout.accepts(tuple(tensor.shape), *to):
      expected = list(move.layout.theirs(*to))
      wrong.append(f"{move.theirs} {list(tensor.shape)}, expected {expected}")
    for i, name in enumerate(move.ours):
      read = functools.partial(_unpack, tensor, move, to, i)
      ours[name] = Lazy(to[i], np.dtype(tensor.dtype), read)
  if wrong:
    raise ValueError(
      f"{path}: not the tensors that the config describes: {listed(wrong)}"
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
    read = functools.partial(_pack, parts, move)
    theirs[move.theirs] = Lazy(shape, *dtypes, read)
  return theirs


def in_dtype(
  ours: Tensors, dtype: str | None, config: ModelConfig
) -> dict[str, Lazy]:
  """Parameters in a dtype or their own; those of decays in float32."""
  kept, cast = float32_names(config), {}
  for name, tensor in ours.items():
    to = np.dtype(tensor.dtype if dtype is None else jnp.dtype(dtype))
    if name in kept:
      to = np.dtype(np.float32)
    read = functools.partial(_cast, tensor, to)
    cast[name] = Lazy(tuple(tensor.shape), to, read)
  return cast


def _unpack(tensor, move, shapes, i):
  # A view would keep its whole tensor, and be copied when it is written.
  return np.ascontiguousarray(
    move.layout.unpack(np.asarray(tensor), *shapes)[i]
  )


def _pack(parts, move):
  return np.ascontiguousarray(move.layout.pack(*map(np.asarray, parts)))


def _cast(tensor, dtype):
  return np.asarray(tensor).astype(dtype, copy=False)
