"""Fixtures for what chooses kernels."""

import pytest

from gdn2_jax.kernels import cases, choice, self_check


@pytest.fixture
def checks(monkeypatch, tmp_path):
  """The self-check on the CPU, as if nothing had been checked yet."""
  path = tmp_path / "a" / "c.json"
  monkeypatch.setattr(self_check, "_passed", {})
  monkeypatch.setattr(self_check, "_enabled", True)
  monkeypatch.setattr(self_check, "_path", lambda: path)
  monkeypatch.setattr(self_check, "_RUNS", 1)
  for name, value in {"_T": 80, "_CHANNELS": 64}.items():
    monkeypatch.setattr(cases, name, value)
  monkeypatch.setattr(choice, "HOPPER", "None")  # what a CPU has
  return path
