"""The hint about a GPU that JAX does not use."""

import jax
import pytest

from gdn2_jax.kernels import nvidia

OPEN = (
  "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build"
)


@pytest.fixture
def machine(monkeypatch, tmp_path):
  """A machine without a driver, on which JAX chose its platform itself."""
  monkeypatch.setattr(nvidia, "DRIVER", tmp_path / "version")
  monkeypatch.setattr(nvidia.shutil, "which", lambda name: None)
  before = jax.config.jax_platforms
  jax.config.update("jax_platforms", None)
  yield tmp_path / "version"
  jax.config.update("jax_platforms", before)


@pytest.mark.parametrize(
  ("driver", "extra"), [("580.65.06", "cuda13"), ("570.86.15", "cuda12")]
)
def test_the_driver_decides_the_extra(machine, driver, extra):
  machine.write_text(OPEN.format(driver))
  assert nvidia.install_hint() == (
    f"an NVIDIA GPU is present: pip install 'jax[{extra}]=={jax.__version__}'"
  )


def test_nvidia_smi_alone_is_enough(machine, monkeypatch):
  monkeypatch.setattr(nvidia.shutil, "which", lambda name: f"/usr/bin/{name}")
  assert "jax[cuda13]" in nvidia.install_hint()


def test_no_hint_without_a_gpu_or_with_a_choice(machine):
  assert nvidia.install_hint() == ""
  machine.write_text(OPEN.format("580.65.06"))
  jax.config.update("jax_platforms", "cpu")
  assert nvidia.install_hint() == ""
