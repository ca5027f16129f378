"""Digests of arrays that find damage, the same on every mesh.

    digest_c(x) = sum_i mix(bits(x_i) xor mix(i + c))      mod 2^32

over the flat index i, for two constants c. `mix` is a bijection of 32 bits, so
every change of a single element changes both sums; changes of several elements
go unseen with probability 2^-64. Integer sums are exact in any order: the
digest is the same on every mesh and in any number of processes.

They do not find forgery: a program that can write a checkpoint can also write
its digest.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped, UInt32

from gdn2_jax.interop.tree import leaves_by_path

_CONSTANTS = (0x9E3779B9, 0x3C6EF372)
_UINTS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def _mix(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
  """A bijection of 32 bits in which every input bit reaches every output."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)


def _bits(x: Shaped[Array, "*shape"]) -> UInt32[Array, "*words"]:
  """The bit pattern as uint32; 64-bit elements become two words."""
  if x.dtype == jnp.bool_:
    return x.astype(jnp.uint32)
  if x.dtype.itemsize == 8:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)
  unsigned = _UINTS[x.dtype.itemsize]
  return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def array_digest(x: Shaped[Array, "*shape"]) -> UInt32[Array, "2"]:
  """Both sums over one array, inside or outside of jit."""
  bits = _bits(x)
  # One iota per axis: a flat arange would be a second array of full size.
  index = jnp.zeros(bits.shape, jnp.uint32)
  stride = 1
  for axis in reversed(range(bits.ndim)):
    steps = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    index = index + steps * jnp.uint32(stride % 2**32)
    stride *= bits.shape[axis]
  return jnp.stack(
    [
      jnp.sum(_mix(bits ^ _mix(index + jnp.uint32(c))), dtype=jnp.uint32)
      for c in _CONSTANTS
    ]
  )


@functools.cache
def _compiled(mesh: Mesh | None):
  out = None if mesh is None else NamedSharding(mesh, PartitionSpec())

  def digests(leaves):
    return jnp.stack([array_digest(x) for x in leaves])

  return jax.jit(digests, out_shardings=out)


def digest(tree: Any) -> dict[str, str]:
  """{path: 16 hex digits} of every array of a tree; every process calls it."""
  leaves = leaves_by_path(tree, "/")
  shardings = [x.sharding for x in leaves.values()]
  mesh = next((s.mesh for s in shardings if isinstance(s, NamedSharding)), None)
  sums = jax.device_get(_compiled(mesh)([*leaves.values()]))
  return {
    path: f"{first:08x}{second:08x}"
    for path, (first, second) in zip(leaves, sums, strict=True)
  }
