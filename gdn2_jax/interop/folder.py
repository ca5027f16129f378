"""Published-model folders: everything that is needed to run a model.

  config.json         format, versions, and the fields of ModelConfig
  model.safetensors   parameters under the names of `tree`; above 5 GB several
                      files and model.safetensors.index.json
  tokenizer.json      if there is one
  README.md           model card; people may edit it
  manifest.json       size and SHA-256 of all the others but README.md

The manifest is written last: a folder without it was not finished. Files that
it does not list, such as those that hubs add, are left alone.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import gdn2_jax
from gdn2_jax import config_json
from gdn2_jax.data.tokenizer.api import load_tokenizer
from gdn2_jax.files import sha256_file, sync_folder, write_atomically
from gdn2_jax.interop import hub
from gdn2_jax.interop.card import Card, render_card
from gdn2_jax.interop.disk import (
  is_plain_name,
  json_bytes,
  read_json,
  regular_size,
)
from gdn2_jax.interop.header import Lazy
from gdn2_jax.interop.tensors import (
  SHARD_BYTES,
  find_weights,
  open_tensors,
  save_shards,
)
from gdn2_jax.interop.tree import (
  check_tensors,
  flatten_params,
  param_specs,
  unflatten_params,
)
from gdn2_jax.model.accounting import abstract_params
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.sharding import shardings_of

FORMAT = "gdn2_jax"
CONFIG, MANIFEST, CARD = "config.json", "manifest.json", "README.md"
TOKENIZER = "tokenizer.json"

_STAGING = ".incoming-"
_VERSION = {"format": FORMAT, "format_version": 1}
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_METADATA = {"format": "np"}  # hubs expect to be told a framework


@dataclasses.dataclass(frozen=True)
class Model:
  """A model in memory.

  Attributes:
    config: model config.
    params: unboxed parameters of LM(config).
    tokenizer: with encode, decode, vocab_size and eos_id; None without one.
  """

  config: ModelConfig
  params: Any
  tokenizer: Any = None


def save_model(
  folder: str | os.PathLike,
  params: Any,
  config: ModelConfig,
  tokenizer: Any = None,
  *,
  card: Card = Card(),  # noqa: B008, frozen
  extra: Mapping[str, bytes] | None = None,
  overwrite: bool = False,
  max_shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes a published-model folder; nothing outside of it.

  All files are written beside their places first, so that an interrupted or
  failed save leaves what was there before.

  Args:
    folder: made if it does not exist.
    params: unboxed parameters of LM(config), on devices of this process.
    config: model config.
    tokenizer: one of `gdn2_jax.data.tokenizer`, or None.
    card: facts for the model card.
    extra: contents of further files by name.
    overwrite: replace the model in this folder, if it holds one.
    max_shard_bytes: size above which the weights become several files.

  Raises:
    ValueError: the folder holds something else, or a model without
      `overwrite`; parameters of another model; a tokenizer with more ids than
      the model.
  """
  folder = pathlib.Path(folder)
  replaced = check_target(folder, overwrite)
  tensors = flatten_params(params, config)
  if tokenizer is not None:
    _check_vocabulary(tokenizer, config)
  for name in extra or {}:
    if not is_plain_name(name) or name in (CONFIG, MANIFEST, CARD, TOKENIZER):
      raise ValueError(
        f"extra[{name!r}]: expected a plain file name that the folder does not "
        "use itself"
      )
  version = {"library_version": gdn2_jax.__version__}
  tree = _VERSION | version | {"model": dataclasses.asdict(config)}
  files = {CONFIG: json_bytes(tree), **(extra or {})}
  if tokenizer is not None:
    files[TOKENIZER] = tokenizer.to_json().encode()
  with staged(folder) as staging:
    names = save_shards(staging, tensors, _METADATA, max_bytes=max_shard_bytes)
    for name, data in files.items():
      write_atomically(staging / name, data)
    names = sorted([*names, *files])
    text = render_card(card, config, name=folder.absolute().name, files=names)
    write_atomically(staging / CARD, text.encode())
    listed = {
      name: {
        "bytes": (staging / name).stat().st_size,
        "sha256": sha256_file(staging / name),
      }
      for name in names
    }
    write_atomically(
      staging / MANIFEST, json_bytes(_VERSION | {"files": listed})
    )
    if replaced:
      _remove_model(folder, keep=names)
    # The manifest last: a folder without it is refused.
    move_files(staging, folder, [*names, CARD, MANIFEST])


@contextlib.contextmanager
def staged(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Subfolder to write to before its files are moved."""
  is_new = not folder.exists()
  folder.mkdir(parents=True, exist_ok=True)
  for abandoned in folder.glob(f"{_STAGING}*"):
    shutil.rmtree(abandoned)
  staging = folder / f"{_STAGING}{uuid.uuid4().hex[:8]}"
  staging.mkdir()
  try:
    yield staging
  finally:
    shutil.rmtree(staging, ignore_errors=True)
    if is_new:
      with contextlib.suppress(OSError):  # not empty: the save succeeded
        folder.rmdir()


def move_files(
  staging: pathlib.Path, folder: pathlib.Path, names: list[str]
) -> None:
  """Renames files to their places, in this order."""
  for name in names:
    os.replace(staging / name, folder / name)
  sync_folder(folder)


def load_model(
  folder: str | os.PathLike,
  *,
  revision: str | None = None,
  mesh: Mesh | None = None,
) -> Model:
  """Reads a published-model folder, all of it or nothing.

  Args:
    folder: as `save_model` wrote it, or "hf:USER/NAME" on the Hugging Face Hub.
    revision: commit, tag or branch of an "hf:" name, unless it ends in one:
      "hf:USER/NAME@REVISION".
    mesh: devices to shard the parameters over by the rules of
      `gdn2_jax.sharding`; None puts them on the default device.

  Returns:
    The model, its parameters in the dtypes of the files.

  Raises:
    FileNotFoundError: no such folder.
    ValueError: not such a folder, an unfinished or damaged one, one of a newer
      format, or parameters that do not fit the config; an "hf:" name without a
      revision.
    ConnectionError: the Hub cannot be reached.
  """
  if hub.is_hub_name(folder):
    folder = hub.fetch(str(folder), revision)
  elif revision is not None:
    raise ValueError(f"revision={revision!r}: only hf: names have revisions")
  folder = pathlib.Path(folder)
  config, tensors = open_folder(folder)
  params = _read_params(tensors, config, mesh)
  tokenizer = None
  if (folder / TOKENIZER).exists():
    tokenizer = load_tokenizer(folder / TOKENIZER)
    _check_vocabulary(tokenizer, config)
  return Model(config, params, tokenizer)


def open_folder(
  folder: pathlib.Path,
) -> tuple[ModelConfig, dict[str, Lazy]]:
  """Checks all of a folder; returns its tensors unread."""
  listed = _read_manifest(folder)
  _verify(folder, listed)
  config = read_config(folder / CONFIG)
  weights = find_weights(folder)
  tensors = open_tensors(weights)
  for path in {weights, *(entry.path for entry in tensors.values())}:
    if path.name not in listed:
      raise ValueError(f"{path}: not in {MANIFEST}")
  check_tensors(tensors, param_specs(config), str(weights))
  return config, tensors


def _read_params(tensors: Any, config: ModelConfig, mesh: Mesh | None) -> Any:
  if mesh is None:
    return unflatten_params(tensors, config)
  params = unflatten_params(tensors, config, place=np.asarray)
  shardings = shardings_of(abstract_params(config), mesh)
  return jax.tree.map(jax.device_put, params, shardings)


def check_target(folder: str | os.PathLike, overwrite: bool) -> bool:
  """True where a model is to be replaced; refuses any other content."""
  folder = pathlib.Path(folder)
  if not folder.exists():
    return False
  if not folder.is_dir():
    raise ValueError(f"{folder}: a file, expected a folder")
  if all(e.name.startswith(_STAGING) for e in folder.iterdir()):
    return False
  if not is_model_folder(folder):
    raise ValueError(
      f"{folder}: not empty, and not a folder with a model: expected a new one"
    )
  if not overwrite:
    raise ValueError(
      f"{folder}: holds a model; overwrite=True or --overwrite replaces it, or "
      "name a new folder"
    )
  return True


def is_model_folder(folder: str | os.PathLike) -> bool:
  """True for a published-model folder, finished or not."""
  for name in (MANIFEST, CONFIG):
    try:
      if read_json(pathlib.Path(folder) / name).get("format") == FORMAT:
        return True
    except (OSError, ValueError):
      continue
  return False


def read_config(path: pathlib.Path) -> ModelConfig:
  """ModelConfig from a config.json of this version."""
  tree = _read_versioned(path, "library_version", "model")
  try:
    config = config_json.from_dict(ModelConfig, tree["model"], "model")
    config.validate()
  except ValueError as e:
    raise ValueError(f"{path}: {e}") from e
  return config


def _read_manifest(folder: pathlib.Path) -> dict[str, tuple[int, str]]:
  """{name: (bytes, SHA-256)} of the files that a manifest lists."""
  if not folder.is_dir():
    raise FileNotFoundError(f"{folder}: no such folder")
  path = folder / MANIFEST
  if not path.is_file():
    raise ValueError(
      f"{folder}: no {MANIFEST}: not a folder with a published model, or one "
      "whose writing was interrupted"
    )
  files = _read_versioned(path, "files")["files"]
  if not isinstance(files, dict):
    raise ValueError(f"{path}: files={files!r}: expected an object")
  found = {}
  for name, spec in files.items():
    match spec:
      case {"bytes": int(size), "sha256": str(sha256), **rest} if not rest:
        found[name] = size, sha256
    if name not in found or not is_plain_name(name):
      raise ValueError(
        f"{path}: files[{name!r}]={spec!r}: expected a plain file name, with "
        "bytes and sha256"
      )
  if CONFIG not in found:
    raise ValueError(f"{path}: {CONFIG} is not listed")
  return found


def _verify(
  folder: pathlib.Path, listed: Mapping[str, tuple[int, str]]
) -> None:
  """Compares files with a manifest: all sizes first, then the hashes."""
  for name, (size, _) in listed.items():
    if not (folder / name).exists():
      raise ValueError(f"{folder / name}: missing, {MANIFEST} lists it")
    found = regular_size(folder / name)
    if found != size:
      raise ValueError(
        f"{folder / name}: {found:,} bytes, {MANIFEST} says {size:,}"
      )
  for name in sorted(_model_files(folder) - set(listed)):
    raise ValueError(f"{folder / name}: not in {MANIFEST}")
  for name, (_, sha256) in listed.items():
    if sha256_file(folder / name) != sha256:
      raise ValueError(
        f"{folder / name}: damaged or altered, its SHA-256 is not the one in "
        f"{MANIFEST}"
      )


def _model_files(folder: pathlib.Path) -> set[str]:
  """Names of all weights and tokenizers in a folder."""
  names = {entry.name for entry in folder.iterdir()}
  return {n for n in names if n == TOKENIZER or _WEIGHTS.fullmatch(n)}


def _read_versioned(path: pathlib.Path, *fields: str) -> dict[str, Any]:
  """A JSON object of our format and version with exactly these fields."""
  tree = read_json(path)
  for name, expected in _VERSION.items():
    found = tree.get(name)
    if type(found) is not type(expected) or found != expected:
      raise ValueError(
        f"{path}: {name}={found!r}, expected {expected!r}: not a model folder "
        "that this version of gdn2_jax reads"
      )
  if wrong := sorted(set(tree) ^ {*_VERSION, *fields}):
    kind = "unknown" if wrong[0] in tree else "missing"
    raise ValueError(f"{path}: {wrong[0]}: {kind} field")
  return tree


def _check_vocabulary(tokenizer: Any, config: ModelConfig) -> None:
  if tokenizer.vocab_size > config.vocab_size:
    raise ValueError(
      f"tokenizer: {tokenizer.vocab_size} ids, the model has only "
      f"model.vocab_size={config.vocab_size}"
    )


def _remove_model(folder: pathlib.Path, keep: Collection[str]) -> None:
  """Removes the manifest, and files of the model that are not replaced."""
  stale = _model_files(folder)
  # After a move that was interrupted there is no manifest.
  if (folder / MANIFEST).is_file():
    with contextlib.suppress(ValueError):
      stale |= set(_read_manifest(folder))
    (folder / MANIFEST).unlink()
  for name in stale - set(keep):
    (folder / name).unlink(missing_ok=True)
