"""Training: configuration, optimizer, step, checkpoints and the loop.

  from gdn2_jax.train import TrainConfig, train

  result = train(TrainConfig(num_steps=100), "runs/one")
  steps, losses = result.losses

The names below are loaded on first use: importing the package imports no JAX.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from gdn2_jax.data.pipeline import DataConfig, open_dataset
  from gdn2_jax.eval.loss.perplexity import EvalConfig
  from gdn2_jax.sharding import MeshConfig
  from gdn2_jax.train.checkpoint.load import Run, load_run
  from gdn2_jax.train.config import CheckpointConfig, TrainConfig
  from gdn2_jax.train.directions import OptimizerKind, register_optimizer
  from gdn2_jax.train.loop import train
  from gdn2_jax.train.optimizer import OptimizerConfig
  from gdn2_jax.train.report.result import Result
  from gdn2_jax.train.report.writers import ReportConfig, Writer

_HOME = {
  "CheckpointConfig": "gdn2_jax.train.config",
  "DataConfig": "gdn2_jax.data.pipeline",
  "EvalConfig": "gdn2_jax.eval.loss.perplexity",
  "MeshConfig": "gdn2_jax.sharding",
  "OptimizerConfig": "gdn2_jax.train.optimizer",
  "OptimizerKind": "gdn2_jax.train.directions",
  "ReportConfig": "gdn2_jax.train.report.writers",
  "Result": "gdn2_jax.train.report.result",
  "Run": "gdn2_jax.train.checkpoint.load",
  "TrainConfig": "gdn2_jax.train.config",
  "Writer": "gdn2_jax.train.report.writers",
  "load_run": "gdn2_jax.train.checkpoint.load",
  "open_dataset": "gdn2_jax.data.pipeline",
  "register_optimizer": "gdn2_jax.train.directions",
  "train": "gdn2_jax.train.loop",
}

__all__ = [
  "CheckpointConfig",
  "DataConfig",
  "EvalConfig",
  "MeshConfig",
  "OptimizerConfig",
  "OptimizerKind",
  "ReportConfig",
  "Result",
  "Run",
  "TrainConfig",
  "Writer",
  "load_run",
  "open_dataset",
  "register_optimizer",
  "train",
]

if not TYPE_CHECKING:  # it would make every name Any

  def __getattr__(name: str):
    if name not in _HOME:
      raise AttributeError(f"module 'gdn2_jax.train' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
  return sorted(__all__)
