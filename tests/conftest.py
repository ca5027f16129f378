"""Suite-wide settings: eight fake CPU devices, strict shapes, no network."""

import gc
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest

if os.environ["JAX_PLATFORMS"] == "cpu":
  jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(config, items):
  """Tests marked gpu are deselected, not skipped, where there is no GPU."""
  if os.environ["JAX_PLATFORMS"] != "cpu":
    return
  keep = [item for item in items if "gpu" not in item.keywords]
  gone = [item for item in items if "gpu" in item.keywords]
  if gone:
    config.hook.pytest_deselected(items=gone)
  items[:] = keep


@pytest.fixture
def rng():
  """A NumPy generator with a fixed seed."""
  import numpy as np

  return np.random.default_rng(0)


@pytest.fixture(scope="module")
def fast_compiles():
  """Programs of a module are left as they are after XLA's passes over HLO.

  LLVM would optimise for longer than programs take that run once. Not where a
  bound on errors is that of an optimised program.
  """
  old = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", old)


@pytest.fixture(scope="module")
def frozen_heap():
  """What is there already is out of the collector's sight for a module.

  Tidying up after a damaged checkpoint goes through all objects; a worker that
  has run other tests holds millions.
  """
  gc.collect()
  gc.freeze()
  yield
  gc.unfreeze()
