"""Output files of a run: metrics.jsonl, TensorBoard, JSON, versions.

metrics.jsonl has one JSON object per line, {"step": ..., "kind": ...} with kind
"train", "eval" or "final"; numbers that are not finite are written as null.
Each line is flushed. On a resume the lines beyond the restored step are
dropped, and so is the final one, so that the file never holds a row twice.
"""

import json
import math
import os
import pathlib
import platform
import socket
import subprocess
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax
from tensorboardX import SummaryWriter

from gdn2_jax.files import write_atomically

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


def read_rows(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Rows of a metrics.jsonl, without a last line that a kill cut off."""
  rows = []
  for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines():
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return rows


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


class Writer:
  """Writes metrics.jsonl and TensorBoard events, on process 0 only."""

  def __init__(self, workdir: str | os.PathLike, first_step: int = 0):
    self._enabled = jax.process_index() == 0
    if not self._enabled:
      return
    root = pathlib.Path(workdir)
    path = root / "metrics.jsonl"
    if path.exists():
      rows = [
        row
        for row in read_rows(path)
        if row["step"] <= first_step and row["kind"] != "final"
      ]
      text = "".join(json.dumps(row) + "\n" for row in rows)
      write_atomically(path, text.encode())
    self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
    # purge_step makes TensorBoard forget what the resume will repeat.
    self._events = SummaryWriter(
      str(root / "tensorboard"), purge_step=first_step + 1
    )

  def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
    """Appends a row of metrics.jsonl and the same TensorBoard scalars."""
    if not self._enabled:
      return
    row: dict[str, Any] = {"step": step, "kind": kind}
    for name, value in values.items():
      finite = not isinstance(value, float) or math.isfinite(value)
      row[name] = value if finite else None
      if finite:
        self._events.add_scalar(f"{kind}/{name}", value, step)
    self._file.write(json.dumps(row) + "\n")
    self._file.flush()

  def close(self) -> None:
    """Flushes and closes both files."""
    if self._enabled:
      self._file.close()
      self._events.close()
