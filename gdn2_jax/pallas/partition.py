"""Kernel calls under vmap and on several devices.

XLA cannot split a kernel call; by default it gathers every operand on every
device. Batch rows and heads are independent, so `over_batch_and_heads` makes
each device run the kernel on the rows and heads that it holds, and treats vmap
as more rows.

A layout gives the batch and head axes of an array, one character per leading
axis: "b", "h", or "." for any other; further axes are "." too. For example,
[B, T, H, K] is "b.h", [B, H, K, V] is "bh", [B, T] is "b", and a number that
all rows share is "".
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
  """Hash of the source of all kernels and of options, eight hex digits."""
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
  """Makes `fun` run on each device's rows and heads, also under vmap.

  The result cannot be differentiated: call it from a jax.custom_vjp.

  Args:
    fun: A module-level function of trees of arrays that returns a tuple of
      trees of arrays. Row b and head h of its results may depend only on row b
      and head h of the operands, for any number of rows and heads.
    operands: Layout of each operand; all arrays of a tree share it.
    results: Layout of each result, in the same way.
    **static: Hashable keyword arguments of fun.

  Returns:
    A function with the results of fun. Automatic mesh axes may split batch and
    heads; along all others arrays are replicated. Under a shard_map over all
    mesh axes it runs on the local block; under a shard_map over some axes,
    arrays are replicated along the rest. Explicit mesh axes need shard_map.
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
      layouts = _spread(operands, args)
      flat = [
        _to_rows(layout, x, b, size)
        for layout, x, b in zip(layouts, flat, is_batched, strict=True)
      ]
      outputs = call(*jax.tree.unflatten(tree, flat))
      outputs = [
        _from_rows(layout, x, size)
        for layout, x in zip(
          _spread(results, outputs), jax.tree.leaves(outputs), strict=True
        )
      ]
      return outputs, [True] * len(outputs)

    outputs = _vary_like(flat, batched(*flat))
    return jax.tree.unflatten(local.tree_of_results(), outputs)

  return call


def _spread(layouts, trees):
  """Repeats the layout of each tree for each of its arrays."""
  return tuple(
    layout
    for layout, tree in zip(layouts, trees, strict=True)
    for _ in jax.tree.leaves(tree)
  )


def _to_rows(layout, x, is_batched, size):
  """Folds a mapped axis into rows, e.g. [size, B, ...] to [size * B, ...]."""
  if "b" not in layout:
    if is_batched:
      raise NotImplementedError(
        f"vmap over a kernel's operand of shape {x.shape[1:]}, which all rows "
        "share"
      )
    return x
  if not is_batched:
    x = jax.numpy.broadcast_to(x[None], (size, *x.shape))
  b = layout.index("b")
  x = jax.numpy.moveaxis(x, 0, b)
  return x.reshape(*x.shape[:b], -1, *x.shape[b + 2 :])


def _from_rows(layout, x, size):
  """Inverse of _to_rows."""
  b = layout.index("b")
  x = x.reshape(*x.shape[:b], size, -1, *x.shape[b + 1 :])
  return jax.numpy.moveaxis(x, b, 0)


def _is_splittable():
  """True if XLA may split a call traced now."""
  if kernel_target.is_interpreted():
    return False  # the interpreter runs on one device only
  # Under a shard_map over all mesh axes a call is local; under one over some of
  # them, custom_partitioning cannot name the remaining axes.
  types = jax.sharding.get_abstract_mesh().axis_types
  return not any(kind == AxisType.Manual for kind in types)


def _vary_like(operands, results):
  """Marks the results of kernels as varying over all axes of the operands."""

  def varying(x):
    return jax.typeof(x).manual_axis_type.varying

  axes = frozenset().union(*map(varying, operands))
  return [
    lax.pcast(x, tuple(sorted(axes - varying(x), key=str)), to="varying")
    for x in results
  ]


class _Local:
  """`fun` on flat lists of arrays, and the tree of its results."""

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

    # The key of JAX's compilation cache does not include the Python callback
    # that splits the call. The fingerprint in the program's name does: a cached
    # program was then split by the callback of the same source.
    function = self._partitioned(flat_fun) if split else flat_fun

    def named(*flat):
      return function(*flat)

    named.__name__ = f"gdn2_{fun.__name__}_{fingerprint(str(options))}"
    self.function = jax.jit(named)

  def tree_of_results(self):
    """Tree of the flat results; known after tracing."""
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
  """Returns the same _Local for equal calls, so that jit compiles it once."""
  del shapes  # part of the key: the tree of results may depend on them
  return _Local(fun, options, operands, results, tree, target, split)


def _pad(layout, rank):
  return layout.ljust(rank, ".")[:rank]


def _axes_of(layouts, arguments):
  """Mesh axes of batch and heads, from the first operand that has both."""
  for layout, x in zip(layouts, arguments, strict=True):
    if "b" in layout and "h" in layout:
      spec = x.sharding.spec
      return spec[layout.index("b")], spec[layout.index("h")]
  raise AssertionError("no operand has a batch and a head axis")


def _sharding_rule(operands, results):
  """Shardy rule: batch and heads stay split, other axes are replicated."""
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
