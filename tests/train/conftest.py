"""A tiny hybrid model on real text, and compiled programs kept between tests.

The token scan stands in for the chunkwise recurrence: it compiles in half the
time, and nothing here depends on which one runs.
"""

import jax
import pytest

from gdn2_jax.data.pipeline import DataConfig, open_dataset
from gdn2_jax.eval.perplexity import EvalConfig
from gdn2_jax.model.attention import AttentionConfig
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.gdn2 import GDN2Config
from gdn2_jax.sharding import MeshConfig
from gdn2_jax.train.checkpoint_config import CheckpointConfig
from gdn2_jax.train.config import TrainConfig
from gdn2_jax.train.optimizer import OptimizerConfig


def make_config(cache_dir: str) -> TrainConfig:
  return TrainConfig(
    model=ModelConfig(
      vocab_size=260,
      model_dim=32,
      num_layers=2,
      pattern="GS",
      mlp_dim=32,
      gdn2=GDN2Config(
        num_heads=2, key_dim=16, value_dim=16, implementation="reference"
      ),
      attention=AttentionConfig(num_heads=2, head_dim=8, window=8),
      dtype="float32",
      loss_chunk=32,
      scan_layers=False,
    ),
    data=DataConfig(
      source="snapshot",
      tokenizer="bytes",
      seq_len=16,
      batch_size=8,
      cache_dir=cache_dir,
      num_threads=0,
    ),
    optimizer=OptimizerConfig(lr=1e-2, final_lr=1e-3, warmup_fraction=0.2),
    mesh=MeshConfig(data=2, fsdp=2, tensor=2),
    checkpoint=CheckpointConfig(every_steps=2, keep=2),
    eval=EvalConfig(
      every_steps=0, batches=1, batch_size=8, length_multiples=(1,)
    ),
    num_steps=6,
    log_every=1,
    max_skipped=2,
  )


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
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  yield
  for name, value in old.items():
    jax.config.update(name, value)
  from jax.experimental.compilation_cache import compilation_cache

  compilation_cache.reset_cache()
