"""Fixtures of the tests of builds."""

import pytest

from gdn2_jax.data.build import recipe
from tests.data import parquet_files
from tests.data.build.small import SHARD_BYTES


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
  monkeypatch.setattr(recipe, "SHARD_BYTES", SHARD_BYTES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("parquet")
  return path, parquet_files.write_folder(path)
