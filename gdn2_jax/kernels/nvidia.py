"""Hint for a machine with an NVIDIA GPU that JAX does not use."""

import pathlib
import re
import shutil

import jax

DRIVER = pathlib.Path("/proc/driver/nvidia/version")
_CUDA13_DRIVER = 580  # the oldest driver that runs CUDA 13


def install_hint() -> str:
  """Command that installs JAX for the GPU of this machine, "" if none is due.

  Nothing is due if JAX uses a GPU, was told which platforms to use, or there is
  no NVIDIA driver.
  """
  if jax.default_backend() != "cpu" or jax.config.jax_platforms:
    return ""
  driver = DRIVER.read_text() if DRIVER.exists() else ""
  if not driver and not shutil.which("nvidia-smi"):
    return ""
  version = re.search(r"\b(\d{3})\.\d+", driver)
  old = version is not None and int(version[1]) < _CUDA13_DRIVER
  return (
    "an NVIDIA GPU is present: pip install "
    f"'jax[{'cuda12' if old else 'cuda13'}]=={jax.__version__}'"
  )
