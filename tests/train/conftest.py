"""A tiny hybrid model on real text; compiled programs, kept between tests."""

import jax
import pytest

from gdn2_jax.data.pipeline import open_dataset
from gdn2_jax.sharding import MeshConfig
from gdn2_jax.train.config import CheckpointConfig, TrainConfig
from tests.faults.tiny import tiny_config


def make_config(cache_dir: str) -> TrainConfig:
  config = tiny_config(cache_dir, num_steps=6)
  config.mesh = MeshConfig(data=2, fsdp=2, tensor=2)
  config.checkpoint = CheckpointConfig(every_steps=2, keep=2)
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


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(tmp_path_factory):
  """Several tests need the same training step: compile it once."""
  old = {
    "jax_compilation_cache_dir": jax.config.jax_compilation_cache_dir,
    "jax_persistent_cache_min_compile_time_secs": (
      jax.config.jax_persistent_cache_min_compile_time_secs
    ),
  }
  path = str(tmp_path_factory.mktemp("programs"))
  jax.config.update("jax_compilation_cache_dir", path)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
  yield
  for name, value in old.items():
    jax.config.update(name, value)
  from jax.experimental.compilation_cache import compilation_cache

  compilation_cache.reset_cache()
