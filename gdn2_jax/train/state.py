"""Training state: parameters, optimizer moments, counters; created sharded."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from gdn2_jax.model import accounting
from gdn2_jax.sharding import replicated, shardings_of
from gdn2_jax.train import optimizer as optimizer_lib


class TrainState(struct.PyTreeNode):
  """The whole state of a run; the data position is `step`.

  Leaves are arrays, or their shapes, or their shardings; counters are int32
  scalars.

  Attributes:
    step: batches consumed, including the skipped ones.
    params: float32 parameters.
    opt_state: optax state; its own count leaves skipped batches out.
    skipped: batches whose update was not finite and therefore not applied.
    skipped_in_a_row: the same, since the last update that was applied.
  """

  step: Any
  params: Any
  opt_state: Any
  skipped: Any
  skipped_in_a_row: Any


@dataclasses.dataclass(frozen=True)
class Blueprint:
  """Shapes, shardings and optimizer of a state that is not allocated yet.

  Attributes:
    optimizer: the transformation that made opt_state.
    abstract: TrainState of jax.ShapeDtypeStruct that carry their shardings.
    shardings: TrainState of jax.sharding.NamedSharding.
  """

  optimizer: optax.GradientTransformation
  abstract: TrainState
  shardings: TrainState


def unbox_abstract(tree: Any) -> Any:
  """Drops axis names without constraining values that do not exist yet."""

  def is_box(leaf):
    return isinstance(leaf, nn.meta.AxisMetadata)

  return jax.tree.map(
    lambda leaf: leaf.unbox(apply_constraint=False) if is_box(leaf) else leaf,
    tree,
    is_leaf=is_box,
  )


def _with_shardings(boxed: Any, mesh: Mesh) -> Any:
  """Shapes and dtypes without axis names, with shardings by the rules."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    unbox_abstract(boxed),
    shardings_of(boxed, mesh),
  )


def abstract_params(model: nn.Module, mesh: Mesh | None = None) -> Any:
  """Parameters as jax.ShapeDtypeStruct, with the shardings of a given mesh."""
  boxed = accounting.abstract_params(model.config)
  return unbox_abstract(boxed) if mesh is None else _with_shardings(boxed, mesh)


def _fresh_state(optimizer, params) -> TrainState:
  """State before the first step; the boxes of the parameters are off."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    skipped=jnp.zeros((), jnp.int32),
    skipped_in_a_row=jnp.zeros((), jnp.int32),
  )


def _like_params(tree: Any, params: Any, mesh: Mesh) -> Any:
  """Shapes with the shardings of the parameters that they belong to.

  An optimizer's state holds trees like that of the parameters: the end of a
  leaf's path is a parameter's path. Leaves of another shape than their
  parameter, such as Adafactor's means over rows, are small and replicated, as
  are counters.
  """
  by_path = dict(jax.tree_util.tree_leaves_with_path(params))

  def place(path, leaf):
    ends = (by_path.get(path[i:]) for i in range(len(path)))
    param = next((p for p in ends if p is not None), None)
    follows = param is not None and param.shape == leaf.shape
    sharding = param.sharding if follows else replicated(mesh)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree_util.tree_map_with_path(place, tree)


def plan_state(
  model: nn.Module,
  config: optimizer_lib.OptimizerConfig,
  num_steps: int,
  mesh: Mesh,
) -> Blueprint:
  """Shapes, dtypes and shardings of the state; allocates nothing."""
  boxed = accounting.abstract_params(model.config)
  optimizer = optimizer_lib.make_optimizer(config, num_steps, boxed)
  state = jax.eval_shape(
    lambda params: _fresh_state(optimizer, params), unbox_abstract(boxed)
  )
  abstract = _like_params(state, _with_shardings(boxed, mesh), mesh)
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  return Blueprint(optimizer, abstract, shardings)


def init_state(model: nn.Module, blueprint: Blueprint, seed: int) -> TrainState:
  """A fresh state, created in shards: no device ever holds all of it.

  Call it under `gdn2_jax.sharding.use_mesh`.
  """

  def init():
    tokens = jnp.zeros((1, 2), jnp.int32)
    params = model.init(jax.random.key(seed), tokens)["params"]
    return _fresh_state(blueprint.optimizer, nn.unbox(params))

  options = None
  if jax.default_backend() == "cpu":
    # Runs once and has thousands of unrolled random-bit operations; optimising
    # them would take five times as long as everything else.
    options = {"xla_backend_optimization_level": 0}
  return jax.jit(
    init, out_shardings=blueprint.shardings, compiler_options=options
  )()


def state_around(params: Any, blueprint: Blueprint) -> TrainState:
  """A fresh state with given parameters, which are donated to it."""

  def init(params):
    return _fresh_state(blueprint.optimizer, params)

  return jax.jit(init, out_shardings=blueprint.shardings, donate_argnums=0)(
    params
  )
