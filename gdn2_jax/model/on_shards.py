"""Ops of layers whose tokens are split over devices.

If the sharding rules split the logical axis "length", XLA would gather whole
sequences for an op that mixes tokens. Layers therefore call such ops through
`on_shards`: if `length_axis` finds that tokens are split, every device runs the
op on its own tokens, and the op exchanges data along `axis_name`. Logical names
describe the arrays, as elsewhere in the model; None is an axis that is not
split.
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
  """Mesh axis that "length" is split over, or None if it is not split.

  Also None if a size is not divisible or a device would hold fewer than
  `tokens` tokens: XLA then partitions the layer itself, with the same result.
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
  """Makes every device run `op` on its own tokens if tokens are split.

  Args:
    op: Function of arrays, options and `axis_name`.
    names: Logical names of the axes of each array argument, by its name.
    out: Logical names of the result, or a list of them for a tuple.
    tokens: Least number of tokens per device.
    exchanges: op has the argument axis_name; False for one that does not mix
      tokens.

  Returns:
    The op on global arrays, with keyword arguments only; an array may be None.
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
    # check_vma=False: Pallas kernels cannot be traced with arguments that are
    # marked as varying over mesh axes.
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
  """Reshapes [B, T, ...] to [P * B, T / P, ...] without moving data.

  For code that loops over tokens without mixing them: every device then loops
  over its own. P is the number of devices that tokens are split over.

  Returns:
    The arrays, and a function that reshapes a result [P * B, T / P] to [B, T].
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
  """Mesh axes of one logical axis."""
  axes = nn.logical_to_mesh_axes((name,))[0]
  if axes is None:
    return ()
  return (axes,) if isinstance(axes, str) else tuple(axes)
