"""Device mesh, logical-axis rules, and checks of sizes against the mesh.

Models name the axes of their arrays ("embed", "heads", ...); RULES says which
mesh axis each name is split over. The mesh has four axes:

  data     copies of the parameters, batch rows split
  fsdp     parameters split by "embed", batch rows split as well
  tensor   heads, MLP width and vocabulary split
  context  the tokens of a row split, and parameters by "embed"

Every use goes through `use_mesh`: linen reads only the mesh that
`jax.set_mesh` installs, so a plain `with mesh:` would silently drop every
logical constraint, and explicit axis types would turn them into assertions.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gdn2_jax.config_class import config_class

MESH_AXES = ("data", "fsdp", "tensor", "context")

RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
  ("batch", ("data", "fsdp")),
  ("length", "context"),
  # Rows of a lookup in a table that is itself split by "embed": only by the
  # mesh axes that "embed" leaves free. Then its channels, once the rows are
  # split like a batch: by those that "batch" leaves free.
  ("lookup", "data"),
  ("lookup_embed", "context"),
  # Parameters.
  ("embed", ("fsdp", "context")),
  ("mlp", "tensor"),
  ("heads", "tensor"),
  ("kv_heads", "tensor"),
  ("vocab", "tensor"),
  ("layers", None),
  ("key_dim", None),
  ("value_dim", None),
  ("head_dim", None),
  ("gate_rank", None),
  ("mimo_rank", None),
  ("taps", None),
  # The width of activations: "embed" would collide with the batch on fsdp.
  ("act_embed", None),
)


@config_class
class MeshConfig:
  """Devices along each mesh axis.

  Attributes:
    data: copies of the parameters; batch rows are split over data x fsdp.
    fsdp: shards of the parameters and of the optimizer state.
    tensor: shards of heads, MLP width and vocabulary.
    context: shards of the tokens of every row, for sequences too long for one
      device; parameters and optimizer state are split over fsdp x context.

  At most one of the four may be -1: all devices that the others leave.
  """

  data: int = 1
  fsdp: int = 1
  tensor: int = 1
  context: int = 1


def mesh_shape(config: MeshConfig, num_devices: int) -> dict[str, int]:
  """{axis: size} in mesh order, with -1 filled in.

  Raises:
    ValueError: a size is neither positive nor -1, two are -1, or the product
      is not num_devices.
  """
  sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
  for axis, size in sizes.items():
    if size < 1 and size != -1:
      raise ValueError(
        f"--config.mesh.{axis}={size}: expected a positive number of devices, "
        "or -1 for all the remaining ones"
      )
  free = [axis for axis, size in sizes.items() if size == -1]
  if len(free) > 1:
    raise ValueError(
      f"--config.mesh.{free[0]}=-1 and --config.mesh.{free[1]}=-1: only one "
      "axis can take the remaining devices"
    )
  product = math.prod(size for size in sizes.values() if size != -1)
  if free:
    sizes[free[0]] = num_devices // product
    product *= sizes[free[0]]
  if product != num_devices:
    flags = ", ".join(f"--config.mesh.{a}={getattr(config, a)}" for a in sizes)
    raise ValueError(
      f"{flags}: the mesh needs {product or 'at least one per axis'} devices "
      f"but there are {num_devices}; set one axis to -1 to use them all"
    )
  return sizes


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
  """The mesh over `devices`, by default all; ValueError as `mesh_shape`."""
  devices = list(jax.devices() if devices is None else devices)
  shape = mesh_shape(config, len(devices))
  return jax.make_mesh(
    tuple(shape.values()),
    MESH_AXES,
    axis_types=(AxisType.Auto,) * len(MESH_AXES),
    devices=devices,
  )


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[Mesh]:
  """Installs the mesh and the logical-axis rules for the `with` body."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
    yield mesh


def shards_of(logical_axis: str, shape: Mapping[str, int]) -> int:
  """Number of parts a logical axis is split into on a mesh of this shape."""
  return math.prod(shape[axis] for axis in _mesh_axes(logical_axis))


def _mesh_axes(logical_axis: str) -> tuple[str, ...]:
  axes = dict(RULES)[logical_axis] or ()
  return (axes,) if isinstance(axes, str) else axes


def check_divisible(
  shape: Mapping[str, int], sizes: Sequence[tuple[str, str, int]]
) -> None:
  """Refuses (flag, logical axis, size) triples that do not split evenly.

  Raises:
    ValueError: names the flag, the size, the logical and the mesh axes.
  """
  for flag, logical_axis, size in sizes:
    parts = shards_of(logical_axis, shape)
    if size % parts:
      over = " x ".join(f"{a}={shape[a]}" for a in _mesh_axes(logical_axis))
      raise ValueError(
        f"{flag} gives {size} along {logical_axis!r}, which does not divide "
        f"over the mesh axes {over} ({parts} parts)"
      )


def shardings_of(boxed: Any, mesh: Mesh) -> Any:
  """NamedSharding of every leaf of a tree boxed with logical axis names."""
  return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Sharding of a batch [B, T]: rows over data, fsdp; tokens over context."""
  return NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "context"))


def replicated(mesh: Mesh) -> NamedSharding:
  """Sharding of a value that is the same on every device."""
  return NamedSharding(mesh, PartitionSpec())
