"""Layers on tokens that are split over devices.

What mixes tokens cannot be left to XLA where the rules split the logical axis
"length": it would gather whole sequences. Such layers call their ops through
`on_shards`: where `length_axis` says that tokens are split, every device runs
the op on its own tokens, and the op exchanges what it needs along `axis_name`.
Arrays are described by logical names, as elsewhere in the model; None is an
axis that is not split.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

Names = tuple[str | None, ...]


def length_axis(*arrays: tuple[Any, Names], tokens: int = 1) -> str | None:
  """The mesh axis that "length" is split over, None where it is whole.

  Also None where a size does not divide, or a device would hold fewer tokens
  than asked for: XLA then splits the layer in its own way, with the same
  result.

  Args:
    *arrays: Of the layer, each with its logical names.
    tokens: That a device must hold.
  """
  (axis,) = _mesh_axes("length") or (None,)  # one axis: shards have one order
  mesh = jax.sharding.get_abstract_mesh()
  if axis is None or mesh.empty or axis not in mesh.shape:
    return None
  kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
  if mesh.shape[axis] == 1 or kinds[axis] != AxisType.Auto:
    return None
  for x, names in arrays:
    for size, name in zip(x.shape, names, strict=True):
      parts = math.prod(mesh.shape[a] for a in _mesh_axes(name))
      if size % parts or (name == "length" and size < tokens * parts):
        return None
  return axis


def on_shards(
  op: Callable[..., Any],
  names: dict[str, Names],
  out: Names | list[Names],
  *,
  tokens: int = 1,
  exchanges: bool = True,
) -> Callable[..., Any]:
  """The op, run by every device on its own tokens where these are split.

  Args:
    op: Takes arrays, options and `axis_name`.
    names: Logical names of each array of the op, by the argument's name.
    out: Logical names of the result, or a list of them for a tuple.
    tokens: That a device must hold.
    exchanges: Whether the op takes axis_name: one that mixes no tokens need
      not.

  Returns:
    The op of whole arrays; it takes all by keyword, None for an absent array.
  """

  def call(**arguments):
    arrays = {
      k: x for k, x in arguments.items() if k in names and x is not None
    }
    options = {k: x for k, x in arguments.items() if k not in names}
    axis = length_axis(
      *((x, names[k]) for k, x in arrays.items()), tokens=tokens
    )
    if exchanges:
      options["axis_name"] = axis
    if axis is None:
      return op(**arrays, **options)
    # Pallas kernels cannot be traced with arguments that are marked as varying.
    run = jax.shard_map(
      lambda arrays: op(**arrays, **options),
      in_specs=({k: nn.logical_to_mesh_axes(names[k]) for k in arrays},),
      out_specs=(
        tuple(map(nn.logical_to_mesh_axes, out))
        if isinstance(out, list)
        else nn.logical_to_mesh_axes(out)
      ),
      check_vma=False,
    )
    return run(arrays)

  return call


def shards_as_rows(
  *arrays: Array,
) -> tuple[tuple[Array, ...], Callable[[Array], Array]]:
  """[B, T, ...] as [P * B, T / P, ...], and back, without moving anything.

  For what goes through the tokens in pieces without mixing them: every device
  then takes pieces of its own tokens. P is 1 where tokens are not split.

  Args:
    *arrays: Of the same B and T.

  Returns:
    The arrays, and a function that takes a result [P * B, T / P] to [B, T].
  """
  names = [("batch", "length", *(None,) * (x.ndim - 2)) for x in arrays]
  axis = length_axis(*zip(arrays, names, strict=True))
  if axis is None:
    return arrays, lambda x: x
  P = jax.sharding.get_abstract_mesh().shape[axis]
  rows = PartitionSpec((axis, *_mesh_axes("batch")))
  B, T = arrays[0].shape[:2]

  def split(x):
    x = x.reshape(B, P, T // P, *x.shape[2:]).swapaxes(0, 1)
    x = x.reshape(P * B, T // P, *x.shape[3:])
    return jax.lax.with_sharding_constraint(x, rows)

  def join(x):
    x = x.reshape(P, B, T // P).swapaxes(0, 1).reshape(B, T)
    return nn.with_logical_constraint(x, ("batch", "length"))

  return tuple(map(split, arrays)), join


def _mesh_axes(name: str | None) -> tuple[str, ...]:
  """The mesh axes of one logical axis."""
  axes = nn.logical_to_mesh_axes((name,))[0]
  if axes is None:
    return ()
  return (axes,) if isinstance(axes, str) else tuple(axes)
