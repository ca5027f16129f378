"""Mesh shapes, the rules, and the checks before anything is allocated."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from gdn2_jax.sharding import (
  MESH_AXES,
  RULES,
  MeshConfig,
  batch_sharding,
  check_divisible,
  make_mesh,
  mesh_shape,
  shardings_of,
  shards_of,
  use_mesh,
)


@pytest.mark.parametrize(
  ("config", "shape"),
  [
    (MeshConfig(data=8), (8, 1, 1, 1)),
    (MeshConfig(data=2, fsdp=-1), (2, 4, 1, 1)),
    (MeshConfig(data=2, fsdp=2, tensor=2), (2, 2, 2, 1)),
    (MeshConfig(fsdp=-1, tensor=8), (1, 1, 8, 1)),
    (MeshConfig(fsdp=2, context=-1), (1, 2, 1, 4)),
  ],
)
def test_mesh_uses_all_devices(config, shape):
  mesh = make_mesh(config)
  assert mesh.axis_names == MESH_AXES
  assert mesh.devices.shape == shape
  # Linen's constraints work on no other kind of axis.
  assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
  ("config", "message"),
  [
    (MeshConfig(fsdp=0), "--config.mesh.fsdp=0: expected a positive"),
    (MeshConfig(data=-2), "--config.mesh.data=-2"),
    (MeshConfig(data=-1, tensor=-1), "only one axis"),
    (MeshConfig(data=3), r"--config.mesh.data=3, .* but there are 8"),
    (MeshConfig(data=-1, fsdp=3), r"fsdp=3.* but there are 8"),
    (MeshConfig(data=-1, fsdp=16), r"fsdp=16.* but there are 8"),
  ],
)
def test_impossible_meshes_are_refused(config, message):
  with pytest.raises(ValueError, match=message):
    mesh_shape(config, 8)


def test_indivisible_sizes_name_flag_dimension_and_axes():
  shape = {"data": 2, "fsdp": 2, "tensor": 4, "context": 2}
  check_divisible(shape, [("--flag", "batch", 8), ("--flag", "heads", 8)])
  with pytest.raises(
    ValueError, match=r"--batch gives 6 along 'batch'.*data=2 x fsdp=2"
  ):
    check_divisible(shape, [("--batch", "batch", 6)])
  with pytest.raises(ValueError, match=r"--heads gives 2 .*'heads'.*tensor=4"):
    check_divisible(shape, [("--heads", "heads", 2)])
  with pytest.raises(ValueError, match=r"--seq_len gives 5 .*context=2"):
    check_divisible(shape, [("--seq_len", "length", 5)])
  assert shards_of("layers", shape) == 1


def test_no_rule_uses_an_unknown_axis():
  assert len(dict(RULES)) == len(RULES)
  for _, axes in RULES:
    axes = (axes,) if isinstance(axes, str) else axes or ()
    assert set(axes) <= set(MESH_AXES)


def test_names_become_shardings():
  mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
  boxed = nn.LogicallyPartitioned(
    jax.ShapeDtypeStruct((4, 8, 16), jnp.float32), ("layers", "embed", "mlp")
  )
  sharding = shardings_of({"kernel": boxed}, mesh)["kernel"]
  assert sharding.spec == PartitionSpec(None, ("fsdp", "context"), "tensor")


def test_batches_split_rows_and_tokens_and_all_axes_but_data_hold_shards():
  mesh = make_mesh(MeshConfig(data=2, context=4))
  assert batch_sharding(mesh).shard_shape((4, 64)) == (2, 16)
  boxed = nn.LogicallyPartitioned(
    jax.ShapeDtypeStruct((8, 16), jnp.float32), ("embed", "mlp")
  )
  assert shardings_of(boxed, mesh).shard_shape((8, 16)) == (2, 16)


def test_constraints_reach_the_program():
  def f(x):
    return nn.with_logical_constraint(x * 2, ("batch", "act_embed")).sum()

  x = jnp.ones((8, 4))
  # Without a mesh linen drops the constraint silently; so it would under
  # `with mesh:`.
  assert "sharding_constraint" not in jax.jit(f).lower(x).as_text()
  with use_mesh(make_mesh(MeshConfig(data=8))):
    text = jax.jit(f).lower(x).as_text()
  assert "sharding_constraint" in text
