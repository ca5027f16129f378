"""Suite-wide settings: eight fake CPU devices, strict shapes, no network."""

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
