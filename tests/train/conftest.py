"""A tiny model on real text; compiled programs, kept between tests."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from gdn2_jax.data.pipeline import open_dataset
from gdn2_jax.sharding import MeshConfig
from gdn2_jax.train import loop, start
from gdn2_jax.train.config import CheckpointConfig, TrainConfig
from gdn2_jax.train.state import TrainState
from tests.faults.tiny import tiny_config


def make_config(cache_dir: str) -> TrainConfig:
  """One recurrent layer, six steps of two microbatches: compiles fast."""
  config = tiny_config(cache_dir, num_steps=6)
  config.model.num_layers, config.model.pattern = 1, "G"
  config.grad_accum = 2
  config.mesh = MeshConfig(data=2, fsdp=2, tensor=2)
  config.checkpoint = CheckpointConfig(every_steps=2, keep=2)
  return config


def make_hybrid(cache_dir: str) -> TrainConfig:
  """A layer of each kind, and no microbatches."""
  config = make_config(cache_dir)
  config.model.num_layers, config.model.pattern = 2, "GS"
  config.grad_accum = 1
  return config


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> str:
  return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def config(cache_dir) -> TrainConfig:
  return make_config(cache_dir)


@pytest.fixture(scope="session")
def dataset(cache_dir):
  return open_dataset(make_config(cache_dir).data)


@pytest.fixture(scope="session")
def batch(dataset):
  """One real batch, some targets masked, the last row almost all padding."""
  batch = dict(next(dataset.train_batches()))
  mask = batch["loss_mask"].copy()
  mask[0, :5] = 0
  mask[7, 2:] = 0
  segment_ids = batch["segment_ids"].copy()
  segment_ids[7, 2:] = 0
  return batch | {"loss_mask": mask, "segment_ids": segment_ids}


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
  """Folder of programs, and functions of the loop that keep their results."""
  kept = [
    (module, name, once_per_input(getattr(module, name)))
    for module, name in (
      (loop, "plan_state"),
      (loop, "make_train_step"),
      (start, "init_state"),
    )
  ]
  return tmp_path_factory.mktemp("programs"), kept


@pytest.fixture(scope="module", autouse=True)
def compiled_programs(programs):
  """Several tests need the same programs: trace and compile each once."""
  # Not for the session: tests of other folders that the same worker runs later
  # must not write their programs there.
  folder, kept = programs
  changed = {
    "jax_compilation_cache_dir": str(folder),
    "jax_persistent_cache_min_compile_time_secs": 0.05,
  }
  old = {name: getattr(jax.config, name) for name in changed}
  for name, value in changed.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  with pytest.MonkeyPatch.context() as patch:
    for module, name, function in kept:
      patch.setattr(module, name, function)
    yield
  for name, value in old.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def once_per_input(function):
  """`function`, whose results are kept; states are copied: steps donate them.

  A run jits its own functions, and so would trace and load again what a run of
  the same config has compiled.
  """
  kept = {}

  def call(*args):
    # The step takes the whole config first, and reads these parts of it.
    if isinstance(args[0], TrainConfig):
      c = args[0]
      shown = (c.model, c.optimizer, c.num_steps, c.grad_accum, args[3])
    else:
      # A blueprint is of the model, the optimizer and the mesh before it.
      shown = args
    key = repr(shown) + str(jax.config.read("jax_disable_most_optimizations"))
    if key not in kept:
      kept[key] = function(*args)
    if isinstance(kept[key], TrainState):
      return jax.tree.map(jnp.copy, kept[key])
    return kept[key]

  return call
