"""A user's script that mypy checks, see test_types.py; it is never run.

Every public name of `gdn2_jax` and `gdn2_jax.train` is here. A name that type
checkers take for Any would pass every `assert_type` but that to `Any`, so the
test also looks at what `reveal_type` prints.
"""

import pathlib
from typing import Any, assert_type

import jax
import numpy as np
import optax  # type: ignore[import-untyped]
from flax import nnx

import gdn2_jax
from gdn2_jax import (
  LM,
  MixerKind,
  ModelConfig,
  decode_step,
  gdn2,
  gdn2_step,
  generate,
  init_state,
  load_model,
  prefill,
  register_mixer,
  save_model,
  stream,
)
from gdn2_jax.model.mixers.gdn2 import GDN2Config, GDN2Mixer
from gdn2_jax.nnx import GDN2, to_nnx
from gdn2_jax.train import (
  CheckpointConfig,
  DataConfig,
  EvalConfig,
  MeshConfig,
  OptimizerConfig,
  OptimizerKind,
  ReportConfig,
  Result,
  Run,
  TrainConfig,
  Writer,
  load_run,
  open_dataset,
  register_optimizer,
  train,
)

# Functions and classes, by line: the test requires types other than Any.
reveal_type(LM)
reveal_type(MixerKind)
reveal_type(ModelConfig)
reveal_type(decode_step)
reveal_type(gdn2)
reveal_type(gdn2_step)
reveal_type(generate)
reveal_type(init_state)
reveal_type(load_model)
reveal_type(prefill)
reveal_type(register_mixer)
reveal_type(save_model)
reveal_type(stream)
reveal_type(CheckpointConfig)
reveal_type(DataConfig)
reveal_type(EvalConfig)
reveal_type(MeshConfig)
reveal_type(OptimizerConfig)
reveal_type(OptimizerKind)
reveal_type(ReportConfig)
reveal_type(Result)
reveal_type(Run)
reveal_type(TrainConfig)
reveal_type(Writer)
reveal_type(load_run)
reveal_type(open_dataset)
reveal_type(register_optimizer)
reveal_type(train)


class Loud:
  """A writer by its protocol."""

  def write(self, step: int, kind: str, values: Any) -> None: ...
  def text(self, name: str, text: str) -> None: ...
  def close(self) -> None: ...


def run(workdir: pathlib.Path) -> None:
  config = TrainConfig(
    model=ModelConfig(num_layers=2, pattern="G", gdn2=GDN2Config(num_heads=2)),
    optimizer=OptimizerConfig(name="muon", options=("beta=0.9",)),
    num_steps=3,
  )
  result = train(config, workdir, writers=[Loud()])
  assert_type(result, Result)
  steps, losses = result.losses
  assert_type(result.step, int)
  print(steps.shape, losses.shape, load_run(workdir).step, config.mesh.fsdp)
  kind = OptimizerKind(make=lambda setup: optax.trace(0.9))
  register_optimizer("own", kind)


def layer(x: jax.Array) -> jax.Array:
  y, _ = GDN2(GDN2Config(), 32, rngs=nnx.Rngs(0))(x)
  to_nnx(GDN2Mixer(GDN2Config()), x, rngs=nnx.Rngs(0))
  q = np.ones((1, 2, 1, 16), np.float32)
  o, state = gdn2(x, x, x, x, x, x)
  assert_type(gdn2_jax.__version__, str)
  print(q, o.shape, state.shape)
  return y
