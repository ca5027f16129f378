"""Statistics of the gates during training, on one row of validation text."""

from typing import Any

import jax
import numpy as np

from gdn2_jax.analysis.gate_means import gate_means
from gdn2_jax.eval.loss.targets import validation_batches
from gdn2_jax.sharding import batch_sharding, shards_of
from gdn2_jax.train.config import TrainConfig
from gdn2_jax.train.report.writers.protocol import GATES

# The gates of all layers are in memory at once.
_MAX_TOKENS = 512


def layer_gates(
  config: TrainConfig, params: Any, dataset: Any
) -> dict[str, float]:
  """Means of `gate_means` by name, such as "gates/half_life/layer_3".

  Runs on the mesh that `gdn2_jax.sharding.use_mesh` installs.
  """
  length = config.data.seq_len
  mesh = jax.sharding.get_mesh()
  is_split = not mesh.empty and shards_of("length", mesh.shape) > 1
  batch = next(validation_batches(dataset, seq_len=length, batch_size=1), None)
  if batch is None:
    return {}
  if not is_split:
    length = min(length, _MAX_TOKENS)
  # A row for every part of a batch; all but the first are padding.
  parts = 1 if mesh.empty else shards_of("batch", mesh.shape)
  arrays = [
    np.pad(batch[name][:, :length], ((0, parts - 1), (0, 0)))
    for name in ("inputs", "segment_ids")
  ]
  # device_put, because the training loop forbids implicit transfers.
  arrays = jax.device_put(arrays, None if mesh.empty else batch_sharding(mesh))
  means = gate_means(config.model, params, *arrays)
  return {
    f"{GATES}{name}/layer_{layer}": value
    for layer, values in means.items()
    for name, value in values.items()
  }
