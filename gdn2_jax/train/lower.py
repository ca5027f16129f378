"""Lowering of the training step on shapes, without data or parameters."""

import jax
from flax import linen as nn
from jax.sharding import Mesh

from gdn2_jax.sharding import batch_sharding
from gdn2_jax.train.config import TrainConfig
from gdn2_jax.train.device_put import BATCH_DTYPES
from gdn2_jax.train.state import Blueprint
from gdn2_jax.train.step import make_train_step


def lower_step(
  config: TrainConfig, model: nn.Module, blueprint: Blueprint, mesh: Mesh
) -> jax.stages.Lowered:
  """Lowers the step on batches of `config.data`; call it under `use_mesh`."""
  shape = (config.data.batch_size, config.data.seq_len)
  batch = {
    name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
    for name, dtype in BATCH_DTYPES.items()
  }
  step = make_train_step(config, model, blueprint, mesh)
  return step.lower(blueprint.abstract, batch)
