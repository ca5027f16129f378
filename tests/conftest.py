"""Suite-wide settings: eight fake CPU devices, strict shapes, quick compiles.

Almost all the time of the suite is compiling, and most programs run once: XLA's
passes over HLO run as always, LLVM's expensive ones do not. A subprocess, and a
module that uses `optimized`, compiles as users do.
"""

import gc
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest

if os.environ["JAX_PLATFORMS"] == "cpu":
  jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)


# Files that take minutes, the longest first: no worker is idle at the end.
LONG = (
  "pallas/gdn2/test_sections.py",
  "pallas/gdn2/test_chunk_kernels.py",
  "pallas/test_projected.py",
  "train/test_mixers.py",
  "replicate/test_run.py",
  "pallas/gdn2/test_intra_grad.py",
  "faults/test_faults.py",
  "bench/test_gpu.py",
  "train/test_cli.py",
  "train/processes/test_distributed_run.py",
  "model/test_lm.py",
  "test_docs.py",
  "test_compile_pins.py",
  "test_notebooks.py",
)


def pytest_configure(config):
  """Workers take files in our order, not those of the most tests first."""
  if hasattr(config.option, "loadscopereorder"):
    config.option.loadscopereorder = False


def pytest_collection_finish():
  """The collector looks at what tests make, and less often.

  Tracing makes millions of objects, and reference counts free almost all.
  """
  gc.collect()
  gc.freeze()
  gc.set_threshold(20_000)


def pytest_collection_modifyitems(config, items):
  """Tests marked gpu are deselected, not skipped, where there is no GPU."""
  root = pathlib.Path(__file__).parent
  ranks = {root / name: rank for rank, name in enumerate(LONG)}
  items.sort(key=lambda item: ranks.get(item.path, len(LONG)))
  if os.environ["JAX_PLATFORMS"] != "cpu":
    return
  keep = [item for item in items if "gpu" not in item.keywords]
  gone = [item for item in items if "gpu" in item.keywords]
  if gone:
    config.hook.pytest_deselected(items=gone)
  items[:] = keep


# Linux allows a process 65,530 mappings (vm.max_map_count). A compiled program
# takes several, and LLVM crashes without a message where it gets no more.
MAPS = pathlib.Path("/proc/self/maps")
MOST_MAPS = 20_000  # a module may add as many


@pytest.fixture(scope="module", autouse=True)
def few_programs():
  """Drops compiled programs after a module if the process holds many."""
  yield
  if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
    jax.clear_caches()
    gc.collect()


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
