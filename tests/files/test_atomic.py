"""Atomic writes: a file is whole, or as it was."""

import os

import pytest

from gdn2_jax import files


def test_a_file_is_replaced_or_kept(tmp_path, monkeypatch):
  path = tmp_path / "new" / "file"
  files.write_atomically(path, b"one")
  files.write_atomically(path, b"two")
  assert path.read_bytes() == b"two"

  def full(_):
    raise OSError("no space left")

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(OSError, match="no space left"):
    files.write_atomically(path, b"three")
  assert path.read_bytes() == b"two"
  assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_block_that_fails_leaves_nothing(tmp_path):
  path = tmp_path / "file"
  with files.replacing(path) as temporary:
    temporary.write_bytes(b"one")
    assert not path.exists()
  with (
    pytest.raises(RuntimeError, match="no"),
    files.replacing(path) as temporary,
  ):
    temporary.write_bytes(b"two")
    raise RuntimeError("no")
  assert path.read_bytes() == b"one"
  assert [p.name for p in tmp_path.iterdir()] == ["file"]
