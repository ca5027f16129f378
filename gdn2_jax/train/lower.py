"""Lowering of the training step on shapes, without data or parameters."""

import jax
from flax import linen as nn
from jax.sharding import Mesh

from gdn2_jax.sharding import batch_sharding
from gdn2_jax.train.config import TrainConfig
from gdn2_jax.train.optimizer import learning_rate
from gdn2_jax.train.state import Blueprint
from gdn2_jax.train.step import make_train_step

_BATCH_DTYPES = {
  "inputs": "int32",
  "targets": "int32",
  "segment_ids": "int32",
  "loss_mask": "float32",
}


def lower_step(
  config: TrainConfig, model: nn.Module, blueprint: Blueprint, mesh: Mesh
) -> jax.stages.Lowered:
  """Lowers the step on batches of `config.data`; call it under `use_mesh`."""
  step = make_train_step(
    model,
    blueprint,
    mesh,
    schedule=learning_rate(config.optimizer, config.num_steps),
    accumulate=config.grad_accum,
  )
  shape = (config.data.batch_size, config.data.seq_len)
  batch = {
    name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
    for name, dtype in _BATCH_DTYPES.items()
  }
  return step.lower(blueprint.abstract, batch)
