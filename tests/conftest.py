"""Suite-wide settings: eight fake CPU devices, strict shapes, quick compiles.

Almost all the time of the suite is compiling, and most programs run once: XLA's
passes over HLO run as always, LLVM's expensive ones do not. A subprocess, and a
module that uses `optimized`, compiles as users do.
"""

import gc
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest

if os.environ["JAX_PLATFORMS"] == "cpu":
  jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)


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
def optimized():
  """Programs of a module are compiled as they are for users."""
  jax.config.update("jax_disable_most_optimizations", False)
  jax.clear_caches()
  yield
  jax.config.update("jax_disable_most_optimizations", True)
  jax.clear_caches()


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
