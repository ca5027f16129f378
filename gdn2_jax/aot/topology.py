"""Compile-only H100 devices, on any machine."""

import importlib.util
import os
import pathlib
import shutil

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

TARGET = pathlib.Path(__file__).with_name("h100.txtpb")


def missing_tool() -> str | None:
  """Sentence about a missing CUDA plugin or ptxas, or None."""
  plugins = importlib.util.find_spec("jax_plugins")
  if (
    plugins is None
    or importlib.util.find_spec("jax_plugins.xla_cuda13") is None
  ):
    return (
      "JAX's CUDA 13 plugin is not installed; run `make aot`, which sets up "
      f"an environment with it for jax {jax.__version__}"
    )
  if find_ptxas() is None:
    return (
      "ptxas was found neither on the PATH nor in $CUDA_HOME, /usr/local/cuda "
      "or the nvidia-cuda-nvcc wheel; install the CUDA 13 toolkit (no GPU or "
      "driver is needed)"
    )
  return None


def find_ptxas() -> pathlib.Path | None:
  """Assembler that JAX would take, None without one."""
  on_path = shutil.which("ptxas")
  if on_path:
    return pathlib.Path(on_path)
  roots = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
  wheels = importlib.util.find_spec("nvidia")
  if wheels is not None:
    roots += [f"{path}/cu13" for path in wheels.submodule_search_locations]
  for root in roots:
    path = pathlib.Path(root or "/nonexistent") / "bin" / "ptxas"
    if path.exists():
      return path
  return None


def h100_devices(count: int = 1) -> list:
  """`count` compile-only H100s of one host."""
  return topologies.get_topology_desc(
    platform="cuda",
    topology=f"1x1x{count}",
    target_config=TARGET.read_text(),
  ).devices


def h100_sharding() -> NamedSharding:
  """Sharding that places an array on one compile-only H100."""
  mesh = Mesh(np.array(h100_devices(1)), ("device",))
  return NamedSharding(mesh, PartitionSpec())
