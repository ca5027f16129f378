"""Metadata of a checkpoint, checked before any array is read.

The files may come from anyone: sizes are compared before anything is allocated,
links are not followed, and nothing is executed.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import stat
from typing import Any

from gdn2_jax.config_json import from_dict
from gdn2_jax.interop.disk import PICKLES, read_json
from gdn2_jax.interop.tree import leaves_by_path
from gdn2_jax.model.config import EXECUTION, NUMERICS, ModelConfig, without
from gdn2_jax.train.config import TrainConfig, differences
from gdn2_jax.train.optimizer import OptimizerConfig

FORMAT = 2
COMMITTED = "commit_success.txt"

_ENTRIES = {
  "params",
  "optimizer",
  "meta",
  "_CHECKPOINT_METADATA",
  COMMITTED,
}
_DTYPES = {
  f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)
}
_DTYPES |= {"float16", "bfloat16", "float32", "float64", "bool"}

_PARTS = ("model", "data", "optimizer")

# Weights hardly compress: files that claim to expand further are forged.
_MAX_EXPANSION = 1000
_SMALL_BYTES = 64 << 20


class CheckpointError(ValueError):
  """A checkpoint is missing, or does not fit what is asked of it."""


class DamagedError(CheckpointError):
  """A checkpoint is incomplete, altered, or of another program."""


class SaveError(RuntimeError):
  """A checkpoint could not be written."""


def numbered_steps(directory: str | os.PathLike) -> list[int]:
  """Steps that have a directory, complete or not, in ascending order."""
  root = pathlib.Path(directory)
  paths = root.iterdir() if root.is_dir() else ()
  return sorted(
    int(path.name)
    for path in paths
    if path.name.isascii() and path.name.isdigit() and path.is_dir()
  )


def committed_steps(directory: str | os.PathLike) -> list[int]:
  """Steps whose checkpoint is complete, in ascending order."""
  root = pathlib.Path(directory)
  return [
    step
    for step in numbered_steps(root)
    if (root / str(step) / COMMITTED).is_file()
  ]


def tree_spec(tree: Any) -> dict[str, list]:
  """{path: [shape, dtype]} of every leaf, as stored in the meta data."""
  return {
    path: [list(leaf.shape), str(leaf.dtype)]
    for path, leaf in leaves_by_path(tree, "/").items()
  }


def make_meta(
  config: TrainConfig, fingerprint: str, versions: dict[str, str], state: Any
) -> dict[str, Any]:
  """The JSON stored with every checkpoint, but for what a save adds."""
  return {
    "config": dataclasses.asdict(config),
    "data_fingerprint": fingerprint,
    "versions": versions,
    "tree": tree_spec(state),
  }


def seal(meta: dict[str, Any]) -> dict[str, Any]:
  """The meta data as JSON gives it back, with a hash of it."""
  meta = json.loads(json.dumps(meta))
  return meta | {"sha256": _hash(meta)}


def _hash(meta: dict[str, Any]) -> str:
  text = json.dumps(meta, sort_keys=True, separators=(",", ":"))
  return hashlib.sha256(text.encode()).hexdigest()


def read_meta(directory: str | os.PathLike, step: int) -> dict[str, Any]:
  """Meta data of a checkpoint; DamagedError unless it is what was saved."""
  path = pathlib.Path(directory) / str(step) / "meta" / "metadata"
  try:
    if path.is_symlink():
      raise ValueError(f"{path}: a link")
    meta = read_json(path)
  except (OSError, ValueError) as e:
    raise DamagedError(f"unreadable meta data: {e}") from e
  sealed = meta.pop("sha256", None)
  if sealed is not None and sealed != _hash(meta):
    raise DamagedError(f"{path}: the meta data was altered (sha256)")
  if meta.get("format") != FORMAT:
    raise CheckpointError(
      f"{path}: checkpoint format {meta.get('format')!r}, this version reads "
      f"{FORMAT}"
    )
  if sealed is None:
    raise DamagedError(f"{path}: the hash of the meta data is missing")
  if meta.get("step") != step:
    raise DamagedError(f"{path}: the meta data is of step {meta.get('step')!r}")
  return meta


def check_meta(
  saved: dict[str, Any], wanted: dict[str, Any], *, allow_data_change: bool
) -> None:
  """Raises CheckpointError if another experiment wrote a checkpoint."""
  # Orbax itself casts dtypes silently and knows nothing of architectures.
  check_fields(saved)
  # Fields that were added since take their defaults, as in `load_run`.
  model = from_dict(ModelConfig, saved["config"]["model"], "config.model")
  changes = list(
    differences(
      without(dataclasses.asdict(model), *NUMERICS, *EXECUTION),
      without(wanted["config"]["model"], *NUMERICS, *EXECUTION),
      "--config.model",
    )
  )
  # The state of the optimizer depends on its name.
  names = [
    tree["config"]["optimizer"].get("name", OptimizerConfig().name)
    for tree in (saved, wanted)
  ]
  changes += list(differences(*names, "--config.optimizer.name"))
  changes += list(differences(saved["tree"], wanted["tree"]))
  old, new = (c["config"].get("init_from", "") for c in (saved, wanted))
  if old != new:
    changes.append(f"--config.init_from: {old!r} -> {new!r}")
  if changes:
    shown = "\n  ".join(changes[:10])
    more = f"\n  and {len(changes) - 10} more" if len(changes) > 10 else ""
    raise CheckpointError(
      "the checkpoint is of another model or optimizer (checkpoint -> this "
      "run):\n"
      f"  {shown}{more}\nuse another --workdir, or the checkpoint's config"
    )
  old, new = saved["data_fingerprint"], wanted["data_fingerprint"]
  if old != new and not allow_data_change:
    data = list(
      differences(
        saved["config"]["data"], wanted["config"]["data"], "--config.data"
      )
    )
    raise CheckpointError(
      "the data is not what the checkpoint was trained on: fingerprint "
      f"{old} in the checkpoint, {new} now"
      + "".join(f"\n  {line}" for line in data)
      + "\npass --config.checkpoint.allow_data_change to resume anyway"
    )


def check_fields(meta: dict[str, Any]) -> None:
  """Raises DamagedError unless every field is there and of its type."""
  config = meta.get("config")
  ok = isinstance(config, dict)
  ok = ok and all(isinstance(config.get(k), dict) for k in _PARTS)
  ok = ok and isinstance(meta.get("data_fingerprint"), str)
  tree = meta.get("tree")
  ok = ok and isinstance(tree, dict) and all(map(_is_spec, tree.values()))
  if not ok:
    raise DamagedError("the meta data lacks fields, or they have other types")


def _is_spec(value: Any) -> bool:
  return (
    isinstance(value, list)
    and len(value) == 2
    and isinstance(value[0], list)
    and all(type(size) is int and size >= 0 for size in value[0])
    and value[1] in _DTYPES
  )


def check_files(step_dir: pathlib.Path, claimed_bytes: int = 0) -> None:
  """Refuses links, pickles, unknown entries, and arrays beyond their files."""
  if step_dir.is_symlink():
    raise DamagedError(f"{step_dir}: a link, not a directory")
  if not step_dir.is_dir():
    raise DamagedError(f"{step_dir}: not a directory")
  unknown = sorted({entry.name for entry in step_dir.iterdir()} - _ENTRIES)
  if unknown:
    raise DamagedError(f"{step_dir / unknown[0]}: not part of a checkpoint")
  on_disk = 0
  for folder, names, files in os.walk(step_dir, followlinks=False):
    for name in names + files:
      path = pathlib.Path(folder, name)
      found = path.lstat()
      if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        raise DamagedError(f"{path}: a link or a special file")
      if path.suffix.lower() in PICKLES:
        raise DamagedError(f"{path}: this kind of file may run code, refused")
      on_disk += found.st_size
  if claimed_bytes > max(_SMALL_BYTES, _MAX_EXPANSION * on_disk):
    raise DamagedError(
      f"{step_dir}: {on_disk:,} bytes of files claim to hold arrays of "
      f"{claimed_bytes:,} bytes"
    )
