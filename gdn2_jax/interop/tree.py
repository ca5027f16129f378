"""Parameters under flat names that do not depend on `scan_layers`.

  embedding.table                      [VOCAB, D]
  layers.{n}.mixer_norm.weight         [D]
  layers.{n}.mixer.q_proj.kernel       [D, H, K]     and so on
  layers.{n}.mlp.{gate,up,down}.kernel
  final_norm.weight                    [D]
  head                                 [D, VOCAB]

Layer n is layer n % P of group n // P, P being the length of the pattern. With
`scan_layers` a leaf holds all groups, stacked; here each layer has its own.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdn2_jax.model.accounting import abstract_params
from gdn2_jax.model.config import ModelConfig

_MOST_LAYERS = 100_000
_SHOWN = 6


def param_specs(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
  """Shape and dtype of every parameter by flat name; allocates nothing.

  Embedding first, then the layers, final norm and head; the same with and
  without `config.scan_layers`.

  Raises:
    ValueError: a config that describes no model.
  """
  config.validate()
  if config.num_layers > _MOST_LAYERS:
    raise ValueError(
      f"model.num_layers={config.num_layers}: expected at most {_MOST_LAYERS}"
    )
  # One group is traced instead of all of them: the shapes are the same.
  scanned = dataclasses.replace(config, scan_layers=True, remat="none")
  specs = {}
  for path, leaf in _traced(scanned):
    if path[0] != "groups":
      specs[".".join(path)] = leaf
      continue
    for group in range(config.num_groups):
      specs[_layer_name(config, group, path[1:])] = jax.ShapeDtypeStruct(
        leaf.shape[1:], leaf.dtype
      )
  return _ordered(specs)


def flatten_params(params: Any, config: ModelConfig) -> dict[str, np.ndarray]:
  """Parameters on the host by flat name, in order of layers.

  Args:
    params: unboxed parameters of LM(config), on any devices of this process.
    config: model config.

  Returns:
    NumPy arrays; a layer of a stacked leaf is a view.

  Raises:
    ValueError: parameters of another model; lists what differs.
  """
  tensors = {}
  for path, leaf in param_leaves(params):
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
      raise ValueError(
        f"params: {'.'.join(path)} is spread over several processes: gather it"
      )
    value = np.asarray(jax.device_get(leaf))
    if path[0] == "groups":
      for group in range(value.shape[0]):
        tensors[_layer_name(config, group, path[1:])] = value[group]
    elif path[0].startswith("group_"):
      group = int(path[0].removeprefix("group_"))
      tensors[_layer_name(config, group, path[1:])] = value
    else:
      tensors[".".join(path)] = value
  check_tensors(tensors, param_specs(config), "params")
  return _ordered(tensors)


def unflatten_params(
  tensors: Mapping[str, Any],
  config: ModelConfig,
  *,
  place: Callable[[Any], Any] = jnp.asarray,
) -> Any:
  """The inverse of `flatten_params`, bit for bit.

  Args:
    tensors: arrays by flat name, or anything with shape and dtype that
      `np.asarray` reads; read one after the other.
    config: model config; its `scan_layers` decides the tree.
    place: function of each leaf, a NumPy array, that returns what the tree
      holds; by default a jax.Array on the default device.

  Returns:
    Unboxed parameters of LM(config), in the shapes and dtypes it declares.

  Raises:
    ValueError: listing the names that are missing, unexpected, or have another
      shape or dtype; before any tensor is read.
  """
  check_tensors(tensors, param_specs(config), "tensors")
  params = {}
  for leaf in leaf_sources(config):
    parts = [np.asarray(tensors[name]) for name in leaf.names]
    params[leaf.path] = place(np.stack(parts) if leaf.stacked else parts[0])
  return nested(params)


def cast_params(params: Any, config: ModelConfig) -> Any:
  """Parameters rounded to the dtypes that `config` declares."""
  specs = param_specs(config)
  dtypes = {
    leaf.path: specs[leaf.names[0]].dtype for leaf in leaf_sources(config)
  }
  return jax.tree_util.tree_map_with_path(
    lambda path, x: x.astype(dtypes[tuple(entry.key for entry in path)]), params
  )


def float32_names(config: ModelConfig) -> set[str]:
  """Parameters by flat name that are float32 whatever param_dtype is."""
  rounded = dataclasses.replace(config, param_dtype="bfloat16")
  specs = param_specs(rounded).items()
  return {name for name, spec in specs if spec.dtype == jnp.float32}


@dataclasses.dataclass(frozen=True)
class Leaf:
  """A leaf of the parameter tree, and the tensors in it."""

  path: tuple[str, ...]  # keys from the root of the tree
  names: tuple[str, ...]  # one flat name, or those of all groups
  stacked: bool  # along a new leading axis


def leaf_sources(config: ModelConfig) -> list[Leaf]:
  """Leaves of the tree of LM(config), in its order."""
  stacks: dict[tuple[str, ...], list[str]] = {}
  for name in param_specs(config):
    path = tuple(name.split("."))
    if path[0] == "layers":
      group, layer = divmod(int(path[1]), len(config.pattern))
      root = "groups" if config.scan_layers else f"group_{group}"
      path = (root, f"layer_{layer}", *path[2:])
    stacks.setdefault(path, []).append(name)
  return [
    Leaf(path, tuple(names), stacked=path[0] == "groups")
    for path, names in stacks.items()
  ]


def check_tensors(
  tensors: Mapping[str, Any],
  specs: Mapping[str, jax.ShapeDtypeStruct],
  what: str = "tensors",
) -> None:
  """Compares names, shapes and dtypes; `what` opens the message."""
  problems = name_differences(tensors, specs)
  for name in [name for name in specs if name in tensors]:
    found, expected = (
      f"{np.dtype(x.dtype)}{list(x.shape)}"
      for x in (tensors[name], specs[name])
    )
    if found != expected:
      problems.append(f"{name}: {found}, expected {expected}")
  if problems:
    raise ValueError(f"{what}: not those of this model: {listed(problems)}")


def name_differences(
  found: Collection[str], expected: Collection[str]
) -> list[str]:
  """Names that are missing, and names that are unexpected."""
  missing = sorted(set(expected) - set(found))
  unexpected = sorted(set(found) - set(expected))
  return [f"missing {name}" for name in missing] + [
    f"unexpected {name}" for name in unexpected
  ]


def listed(problems: list[str]) -> str:
  """The first problems in one line, and the number of the others."""
  more = len(problems) - _SHOWN
  return "; ".join(problems[:_SHOWN]) + (
    f"; and {more} more" if more > 0 else ""
  )


def nested(values: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
  """{("a", "b"): x} as {"a": {"b": x}}."""
  tree: dict[str, Any] = {}
  for (*path, last), value in values.items():
    owner = tree
    for key in path:
      owner = owner.setdefault(key, {})
    owner[last] = value
  return tree


@functools.lru_cache(maxsize=16)
def _traced(config: ModelConfig) -> list[tuple[tuple[str, ...], Any]]:
  try:
    return param_leaves(abstract_params(config))
  except OverflowError as e:
    raise ValueError("model: sizes that no array can have") from e


def leaves_by_path(tree: Any, separator: str) -> dict[str, Any]:
  """{path: leaf} of any tree, as in "params/embedding/table" with "/"."""
  return {
    jax.tree_util.keystr(path, simple=True, separator=separator): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def param_leaves(tree: Any) -> list[tuple[tuple[str, ...], Any]]:
  """Leaves and their dictionary keys; boxes of axis names add no key."""
  keyed = jax.tree_util.DictKey
  return [
    (tuple(str(e.key) for e in path if isinstance(e, keyed)), leaf)
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
  ]


def _layer_name(config: ModelConfig, group: int, path: tuple[str, ...]) -> str:
  layer = int(path[0].removeprefix("layer_"))
  number = group * len(config.pattern) + layer
  return ".".join(["layers", str(number), *path[1:]])


def _ordered(tensors: dict[str, Any]) -> dict[str, Any]:
  """Embedding, layers by number, final norm, head."""

  def rank(name):
    if name.startswith("layers."):
      return 1, int(name.split(".")[1]), name
    return (0, 0, name) if name.startswith("embedding.") else (2, 0, name)

  return {name: tensors[name] for name in sorted(tensors, key=rank)}
