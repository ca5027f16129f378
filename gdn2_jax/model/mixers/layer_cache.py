"""One layer's part of the caches of many layers, which are one array."""

from typing import Any

import jax
from flax import struct
from jax import lax


@struct.dataclass
class CacheLayer:
  """One layer of a cache.

  A mixer that gets this updates its part in place. A slice would be copied out
  of the cache and back.

  Attributes:
    cache: Cache of N layers, leaves [N, B, ...].
    layer: Index of the layer.
  """

  cache: Any
  layer: Any

  def read(self) -> Any:
    """The cache of this layer, leaves [B, ...]."""
    return jax.tree.map(self.of_layer, self.cache)

  def of_layer(self, stack: Any) -> Any:
    """This layer's part of an array of all layers."""
    return lax.dynamic_index_in_dim(stack, self.layer, keepdims=False)

  def write(self, new: Any) -> "CacheLayer":
    """The cache with `new`, a tree with leaves [B, ...], in this layer."""
    return self.replace(cache=jax.tree.map(self._updated, self.cache, new))

  def update(self, **arrays: Any) -> "CacheLayer":
    """The cache with arrays [B, ...] in some fields of this layer."""
    stacks = {
      name: self._updated(getattr(self.cache, name), x)
      for name, x in arrays.items()
    }
    return self.replace(cache=self.cache.replace(**stacks))

  def _updated(self, stack, x):
    x = x.astype(stack.dtype)
    return lax.dynamic_update_index_in_dim(stack, x, self.layer, 0)


def as_layer(cache: Any) -> CacheLayer:
  """The cache itself, or as a stack of one that of a layer, leaves [B, ...]."""
  if isinstance(cache, CacheLayer):
    return cache
  return CacheLayer(jax.tree.map(lambda a: a[None], cache), 0)


def like(cache: Any, new: CacheLayer) -> Any:
  """`new` in the form that `cache` had before `as_layer`."""
  if isinstance(cache, CacheLayer):
    return new
  return jax.tree.map(lambda a: a[0], new.cache)
