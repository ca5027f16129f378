"""Checkpoints: saved, verified, resumed from, read by others."""

from gdn2_jax.train.checkpoint.load import Run, load_run
from gdn2_jax.train.checkpoint.manager import Checkpointer
from gdn2_jax.train.checkpoint.meta import (
  CheckpointError,
  DamagedError,
  SaveError,
)

__all__ = [
  "CheckpointError",
  "Checkpointer",
  "DamagedError",
  "Run",
  "SaveError",
  "load_run",
]
