"""Kernels under vmap and on many devices.

XLA cannot split a kernel call: left alone it gathers every operand on every
device. Batch rows and heads are independent, so a call that is told so runs on
the rows and heads that a device holds, and vmap is only more rows.

A layout says where the batch and head axes of an array are: one character for
each leading axis, "b", "h", or "." for any other; axes after the last character
are "." too. [B, T, H, K] is "b.h", [B, H, K, V] is "bh", [B, T] is "b".
"""

import functools
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import (
  ArrayMapping,
  SdyShardingRule,
  custom_partitioning,
)
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gdn2_jax.kernels import target as kernel_target

# Layouts of trees, as nested tuples of strings: hashable.
Layouts = tuple[Any, ...]


@functools.cache
def fingerprint(options: str = "") -> str:
  """Eight hexadecimal digits: of the source of all kernels, and of options."""
  digest = hashlib.sha256(options.encode())
  package = pathlib.Path(__file__).parent.parent
  for path in sorted(
    [*package.glob("pallas/**/*.py"), *package.glob("triton/*.py")]
  ):
    digest.update(path.name.encode() + b"\0" + path.read_bytes())
  return digest.hexdigest()[:8]


def over_batch_and_heads(
  fun: Callable[..., Any],
  operands: Layouts,
  results: Layouts,
  **static: Any,
) -> Callable[..., Any]:
  """fun on local rows and heads, with vmap folded into the rows.

  The result cannot be differentiated: call it from a jax.custom_vjp.

  Args:
    fun: A module-level function of trees of arrays that returns a tuple of
      trees of arrays. Row b and head h of its results depend on row b and head
      h of the operands only, and it takes any number of rows and heads.
    operands: The layout of each operand; one string serves all arrays of an
      operand that is a tree.
    results: The layout of each result, in the same way.
    **static: Hashable keyword arguments of fun.

  Returns:
    A function equal to fun. Over automatic mesh axes it stays split along
    batch and heads; all other axes are replicated. Under a shard_map over all
    mesh axes it runs on the block at hand; under one over some of them, the
    others are replicated. With explicit mesh axes, use shard_map.
  """
  options = tuple(sorted(static.items()))

  def call(*args):
    flat, tree = jax.tree.flatten(args)
    shapes = tuple((x.shape, x.dtype) for x in flat)
    local = _build(
      fun,
      options,
      _spread(operands, args),
      results,
      tree,
      shapes,
      kernel_target.current(),
      _is_splittable(),
    )

    @custom_vmap
    def batched(*flat):
      return local.function(*flat)

    @batched.def_vmap
    def _fold(size, is_batched, *flat):
      flat = [
        _to_rows(x, b, size) for x, b in zip(flat, is_batched, strict=True)
      ]
      outputs = call(*jax.tree.unflatten(tree, flat))
      outputs = [
        x.reshape(size, -1, *x.shape[1:]) for x in jax.tree.leaves(outputs)
      ]
      return outputs, [True] * len(outputs)

    outputs = _vary_like(flat, batched(*flat))
    return jax.tree.unflatten(local.tree_of_results(), outputs)

  return call


def _spread(layouts, trees):
  """One layout for each array of the trees."""
  return tuple(
    layout
    for layout, tree in zip(layouts, trees, strict=True)
    for _ in jax.tree.leaves(tree)
  )


def _to_rows(x, is_batched, size):
  """[size, B, ...] or an unmapped [B, ...] to [size * B, ...]."""
  if not is_batched:
    x = jax.numpy.broadcast_to(x[None], (size, *x.shape))
  return x.reshape(-1, *x.shape[2:])


def _is_splittable():
  """Whether XLA may split a call traced now."""
  if kernel_target.is_interpreted():
    return False  # the interpreter is a program for one device
  # A mesh that is split by hand in part has no name for what is left.
  types = jax.sharding.get_abstract_mesh().axis_types
  return not any(kind == AxisType.Manual for kind in types)


def _vary_like(operands, results):
  """Kernels do not say over which mesh axes their results vary: all."""

  def varying(x):
    return jax.typeof(x).manual_axis_type.varying

  axes = frozenset().union(*map(varying, operands))
  return [
    lax.pcast(x, tuple(sorted(axes - varying(x), key=str)), to="varying")
    for x in results
  ]


class _Local:
  """fun between flat lists of arrays, and the tree of its results."""

  def __init__(self, fun, options, operands, results, tree, target, split):
    self._fun = functools.partial(fun, **dict(options))
    self._operands = operands
    self._results = results
    self._tree = tree
    self._target = target
    self._result_tree = None
    self._result_layouts = None

    def flat_fun(*flat):
      with kernel_target.use(target):
        results = self._fun(*jax.tree.unflatten(tree, flat))
      self._result_tree = jax.tree.structure(results)
      self._result_layouts = _spread(self._results, results)
      return jax.tree.leaves(results)

    # The program names what the kernels are: one that is found in a cache of
    # compiled programs was then split by the same callback, though the cache
    # cannot see into callbacks.
    function = self._partitioned(flat_fun) if split else flat_fun

    def named(*flat):
      return function(*flat)

    named.__name__ = f"gdn2_{fun.__name__}_{fingerprint(str(options))}"
    self.function = jax.jit(named)

  def tree_of_results(self):
    """The tree that the flat results belong to, once traced."""
    assert self._result_tree is not None
    return self._result_tree

  def _partitioned(self, flat_fun):
    split = custom_partitioning(flat_fun)

    def partition(mesh, arguments, results):
      rows, heads = _axes_of(self._operands, arguments)

      def shard(layout, x):
        names = {"b": rows, "h": heads}
        spec = [names.get(axis) for axis in _pad(layout, len(x.shape))]
        return NamedSharding(mesh, PartitionSpec(*spec))

      into = [
        shard(*pair) for pair in zip(self._operands, arguments, strict=True)
      ]
      out = [
        shard(*pair) for pair in zip(self._result_layouts, results, strict=True)
      ]
      return mesh, flat_fun, out, tuple(into)

    def rule(mesh, operand_types, result_types):
      del mesh
      return _sharding_rule(
        zip(self._operands, operand_types, strict=True),
        zip(self._result_layouts, result_types, strict=True),
      )

    split.def_partition(partition=partition, sharding_rule=rule)
    return split


@functools.lru_cache(maxsize=256)
def _build(fun, options, operands, results, tree, shapes, target, split):
  """A _Local; the same one for equal calls, so that jit compiles it once."""
  del shapes  # part of the key: the tree of results may depend on them
  return _Local(fun, options, operands, results, tree, target, split)


def _pad(layout, rank):
  return layout.ljust(rank, ".")[:rank]


def _axes_of(layouts, arguments):
  """Mesh axes of the batch and of the heads, by the first that has both."""
  for layout, x in zip(layouts, arguments, strict=True):
    if "b" in layout and "h" in layout:
      spec = x.sharding.spec
      return spec[layout.index("b")], spec[layout.index("h")]
  raise AssertionError("no operand has a batch and a head axis")


def _sharding_rule(operands, results):
  """Batch and heads pass through; every other axis must be whole."""
  whole = []

  def mapping(layout, ir_type):
    axes = []
    for axis in _pad(layout, len(ir_type.shape)):
      if axis == ".":
        whole.append(f"x{len(whole)}")
        axis = whole[-1]
      axes.append(axis)
    return ArrayMapping(*axes)

  return SdyShardingRule(
    tuple(mapping(*pair) for pair in operands),
    tuple(mapping(*pair) for pair in results),
    need_replication_factors=tuple(whole),
  )
