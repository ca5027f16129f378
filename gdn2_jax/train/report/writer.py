"""Output files of a run: JSON, versions, and a test that it can write."""

import json
import os
import pathlib
import platform
import socket
import subprocess
from importlib import metadata
from typing import Any

import jax

from gdn2_jax.files import write_atomically
from gdn2_jax.train.report.writers.jsonl import read_rows

__all__ = ["probe", "read_rows", "versions", "write_json"]

_PACKAGES = (
  "gdn2-jax",
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "grain",
  "numpy",
)


def write_json(path: pathlib.Path, tree: Any) -> None:
  """Replaces a file by indented JSON, atomically."""
  write_atomically(path, (json.dumps(tree, indent=2) + "\n").encode())


def probe(directory: pathlib.Path) -> None:
  """Makes the directory and writes to it; ValueError if that fails."""
  # At the start, not at the first save hours later. The folder of checkpoints
  # may be a link to another disk. Several processes may share the directory.
  name = f".probe-{socket.gethostname()}-{os.getpid()}"
  for folder in (directory, directory / "checkpoints"):
    path = folder / name
    try:
      if folder == directory:
        folder.mkdir(parents=True, exist_ok=True)
      elif not folder.is_symlink() and not folder.exists():
        continue
      write_atomically(path, b"probe")
      path.unlink()
    except OSError as e:
      raise ValueError(f"--workdir={folder}: cannot write there: {e}") from e


def versions() -> dict[str, str]:
  """Versions of packages, devices, and the commit if this is a checkout."""
  found = {"python": platform.python_version()}
  for package in _PACKAGES:
    try:
      found[package] = metadata.version(package)
    except metadata.PackageNotFoundError:
      found[package] = "not installed"
  devices = jax.devices()
  found["device"] = f"{len(devices)} x {devices[0].device_kind}"
  found["processes"] = str(jax.process_count())
  if commit := _git_commit():
    found["git"] = commit
  return found


def _git_commit() -> str | None:
  """Commit of the source tree, with "+changes" where it was edited."""
  home = pathlib.Path(__file__).parents[3]
  if not (home / ".git").exists():
    return None
  try:
    return subprocess.run(
      ["git", "describe", "--always", "--abbrev=40", "--dirty=+changes"],
      cwd=home,
      capture_output=True,
      text=True,
      timeout=10,
      check=True,
    ).stdout.strip()
  except (OSError, subprocess.SubprocessError):
    return None
