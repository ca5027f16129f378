"""The digest sees every change and no change of place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gdn2_jax.sharding import MeshConfig, make_mesh
from gdn2_jax.train.checkpoint.digest import array_digest, digest

DTYPES = ("float32", "bfloat16", "float16", "int32", "int8", "uint8", "bool")


def mix(x: int) -> int:
  x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
  x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
  return x ^ (x >> 16)


def test_definition():
  """The sums, one element at a time in Python integers."""
  x = jnp.arange(12, dtype=jnp.float32).reshape(2, 3, 2) * 0.37
  bits = np.asarray(x).view(np.uint32).ravel()
  expected = [
    sum(mix(int(b) ^ mix((i + c) % 2**32)) for i, b in enumerate(bits)) % 2**32
    for c in (0x9E3779B9, 0x3C6EF372)
  ]
  np.testing.assert_array_equal(array_digest(x), expected)
  (value,) = digest({"x": x}).values()
  assert value == "".join(f"{part:08x}" for part in expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_flipped_bit_shows(rng, dtype):
  x = rng.integers(0, 2, 40) if dtype == "bool" else rng.normal(size=40) * 9
  x = np.asarray(jnp.asarray(x, dtype))
  raw = x.view(np.uint8)
  flipped = np.repeat(raw[None], 8 * raw.size, axis=0)
  bits = np.arange(8 * raw.size)
  flipped[bits, bits // 8] ^= (1 << (bits % 8)).astype(np.uint8)
  if dtype == "bool":
    flipped = flipped[flipped.max(axis=1) < 2]
  every = jax.jit(jax.vmap(array_digest))(jnp.asarray(flipped.view(x.dtype)))
  good = np.asarray(array_digest(jnp.asarray(x)))
  # Either sum alone sees it.
  assert np.all(np.asarray(every) != good)


def test_order_and_shape_count_only_through_the_index():
  x = jnp.arange(6, dtype=jnp.float32)
  first = digest({"x": x})
  assert digest({"x": x[::-1]}) != first
  assert digest({"x": x.reshape(2, 3)}) == first  # shapes are compared apart
  assert digest({"y": x}).keys() == {"y"}


def test_empty_scalar_and_negative_zero():
  empty = digest({"x": jnp.zeros((0, 3))})["x"]
  assert empty == "0" * 16
  zero = jnp.zeros(())
  assert digest({"x": zero}) != digest({"x": -zero})


def test_equal_on_every_mesh(rng):
  """8 devices in a row, 4 x 2, one, 2 x 2 x 2: the same digests."""
  host = {
    "matrix": rng.normal(size=(16, 24)).astype(np.float32),
    "vector": rng.normal(size=8).astype(np.float32),
    "step": np.int32(7),
  }
  specs = {
    "matrix": PartitionSpec("fsdp", "tensor"),
    "vector": PartitionSpec("tensor"),
    "step": PartitionSpec(),
  }
  want = digest(jax.tree.map(jnp.asarray, host))
  for config in (
    MeshConfig(fsdp=8),
    MeshConfig(fsdp=4, tensor=2),
    MeshConfig(data=2, fsdp=2, tensor=2),
    MeshConfig(data=8),
  ):
    mesh = make_mesh(config)
    placed = {
      name: jax.device_put(x, NamedSharding(mesh, specs[name]))
      for name, x in host.items()
    }
    assert digest(placed) == want
  host["vector"][3] = np.nextafter(host["vector"][3], np.float32(9))
  assert digest(jax.tree.map(jnp.asarray, host)) != want
