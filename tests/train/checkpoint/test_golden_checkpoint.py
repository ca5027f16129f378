"""Checkpoints of every released version can be gone on from."""

import json
import tarfile

import numpy as np
import pytest

from gdn2_jax.train.checkpoint.meta import read_meta
from tests.train.checkpoint.make_golden import FOLDER, SAVED, go_on

pytestmark = pytest.mark.slow

VERSIONS = sorted(
  path.name.removesuffix(".tar.xz") for path in FOLDER.iterdir()
)


def test_there_is_one():
  assert "0.1.0" in VERSIONS


@pytest.mark.parametrize("version", VERSIONS)
def test_training_goes_on_as_it_did(version, tmp_path):
  """The same losses, gradients and learning rates, up to rounding."""
  with tarfile.open(FOLDER / f"{version}.tar.xz") as archive:
    archive.extractall(tmp_path, filter="data")
  assert read_meta(tmp_path / "checkpoints", SAVED)["format"] == 2
  expected = json.loads((tmp_path / "expected.json").read_text())
  batches = [
    dict(np.load(tmp_path / f"batch-{number}.npz"))
    for number in range(len(expected))
  ]
  rows = go_on(tmp_path, batches)
  for row, wanted in zip(rows, expected, strict=True):
    assert row == pytest.approx(wanted, rel=1e-5)
