"""Snapshots of a state: one safetensors file each, loaded bit for bit.

The tensors are the leaves of the state, "cache.0.state", "cache.0.conv_q", ...,
"position"; of the keys and values of full attention only the slots in use. The
metadata fields are

  format, version   of this layout
  model, config     hash of the config fields that decide the model's function,
                    and these fields; one missing in the file has its default
  weights           hash of the parameters
  tokenizer         hash of the tokenizer, "" without one
  positions         tokens read by each row
  dtype             dtype of the recurrent states in the file
  session           JSON of a conversation (`session.py`), "" for a bare state
  digest            SHA-256 over all of the above and every bit of the tensors

The digest finds damage, not forgery: anyone who can write the file can also
write its digest.
"""

import contextlib
import functools
import json
import os
import pathlib
import re
import time
from typing import Any

import jax
import numpy as np

from gdn2_jax import config_json
from gdn2_jax.inference.checks import require_alive
from gdn2_jax.inference.identity import (
  Identity,
  function_of,
  hash_tensors,
  hash_text,
)
from gdn2_jax.inference.state import State, init_state
from gdn2_jax.interop.header import read_header
from gdn2_jax.interop.tensors import save_tensors
from gdn2_jax.interop.tree import check_tensors
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.kv_cache import KVCache

FORMAT = "gdn2_jax.state"
VERSION = "1"

_DTYPES = ("float32", "bfloat16")
_FIELDS = frozenset(
  (
    "format",
    "version",
    "model",
    "config",
    "weights",
    "tokenizer",
    "positions",
    "dtype",
    "session",
    "digest",
  )
)
_LEFTOVER_SECONDS = 600.0  # a living writer adds bytes more often


def save_state(
  path: str | os.PathLike,
  state: State,
  identity: Identity,
  *,
  dtype: str = "float32",
) -> None:
  """Writes a state of any number of rows in one step.

  Args:
    path: file to write, usually *.safetensors; an existing one is replaced.
    state: state of B sequences; stays usable.
    identity: identity of the model that made it, from `identify`.
    dtype: dtype of the recurrent states in the file. "float32" keeps every bit;
      "bfloat16" halves their size and rounds, so a continuation is close, not
      equal.

  Raises:
    ValueError: a state of another model, a donated one, or an unknown dtype.
    OSError: the file cannot be written; an existing one is unchanged.
  """
  write_state(path, state, identity, dtype=dtype)


def load_state(
  path: str | os.PathLike, identity: Identity, *, room: int = 0
) -> State:
  """Reads a file of `save_state` onto the default device.

  Args:
    path: file to read; a session file gives its state alone.
    identity: identity of the model that continues, from `identify`.
    room: tokens that the longest row may still read; for models with layers
      "A", ignored by others.

  Raises:
    FileNotFoundError: no such file.
    ValueError: not a state file, truncated, changed, or of another model,
      weights or tokenizer: the message names the field, the value in the file
      and the expected value. Or room < 0.
  """
  return read_state(path, identity, room)[0]


def write_state(
  path: str | os.PathLike,
  state: State,
  identity: Identity,
  *,
  dtype: str = "float32",
  session: str = "",
) -> None:
  """Writes a state, with a text for the field `session`."""
  require_alive(state)
  if dtype not in _DTYPES:
    raise ValueError(f"dtype={dtype!r}: expected one of {_DTYPES}")
  if function_of(state.config) != identity.function:
    raise ValueError(
      "state: its model is not that of identity: "
      + _difference(function_of(state.config), identity.function)
    )
  state = jax.device_get(state)
  positions = state.position.tolist()
  if min(positions) < 0:
    raise ValueError(f"state: position={positions}: expected >= 0")
  tensors = _named(_with_slots(state, max(1, *positions)))
  for name in _recurrent(tensors):
    with np.errstate(invalid="ignore"):  # NumPy warns of a NaN it converts
      tensors[name] = tensors[name].astype(dtype, copy=False)
  metadata = {
    "format": FORMAT,
    "version": VERSION,
    "model": identity.model,
    "config": identity.function,
    "weights": identity.weights,
    "tokenizer": identity.tokenizer,
    "positions": json.dumps(positions),
    "dtype": dtype,
    "session": session,
  }
  metadata["digest"] = _digest(metadata, tensors)
  save_tensors(path, tensors, metadata)
  path = pathlib.Path(path)
  name = re.escape(f".{path.name}.tmp-") + "[0-9a-f]+"
  remove_leftovers(path.parent, re.compile(name))


def remove_leftovers(folder: pathlib.Path, names: re.Pattern[str]) -> None:
  """Removes files of killed writers, by name and age."""
  with os.scandir(folder) as found:
    for entry in found:
      if not names.fullmatch(entry.name):
        continue
      with contextlib.suppress(FileNotFoundError):
        age = time.time() - entry.stat(follow_symlinks=False).st_mtime
        if age > _LEFTOVER_SECONDS:
          os.unlink(entry.path)


def read_state(
  path: str | os.PathLike, identity: Identity, room: int
) -> tuple[State, str]:
  """Reads a state and the text of the field `session`."""
  path = pathlib.Path(path)
  if room < 0:
    raise ValueError(f"room: expected >= 0, got {room}")
  header = read_header(path)
  metadata = header.metadata
  _check_metadata(path, metadata, identity)
  tensors = {name: np.asarray(x) for name, x in header.tensors.items()}
  digest = _digest(metadata, tensors)
  if metadata["digest"] != digest:
    raise _mismatch(f"{path}: damaged", "digest", metadata["digest"], digest)
  positions = json.loads(metadata["positions"])
  longest = max(1, *positions)
  abstract = _abstract_state(
    identity.config,
    len(positions),
    # Without full attention one cached entry serves all lengths.
    longest if "A" in identity.config.pattern else 1,
  )
  specs = _named(abstract)
  for name in _recurrent(specs):
    specs[name] = jax.ShapeDtypeStruct(specs[name].shape, metadata["dtype"])
  check_tensors(tensors, specs, str(path))
  for name in _recurrent(tensors):
    tensors[name] = tensors[name].astype(np.float32, copy=False)
  state = jax.tree.unflatten(
    jax.tree.structure(abstract), [tensors[name] for name in specs]
  )
  return jax.device_put(_with_slots(state, longest + room)), metadata["session"]


def _check_metadata(path, metadata, identity: Identity) -> None:
  """Raises ValueError unless this is a state of the model."""
  for name, expected in (("format", FORMAT), ("version", VERSION)):
    if metadata.get(name) != expected:
      raise _mismatch(path, name, metadata.get(name), expected)
  if set(metadata) != _FIELDS:
    wrong = ", ".join(sorted(_FIELDS ^ set(metadata)))
    raise ValueError(f"{path}: metadata: missing or unexpected: {wrong}")
  if metadata["model"] != identity.model and not _has_function(
    metadata["config"], identity
  ):
    error = _mismatch(path, "model", metadata["model"], identity.model)
    difference = _difference(metadata["config"], identity.function)
    raise ValueError(f"{error}: {difference}")
  for name in ("weights", "tokenizer"):
    if metadata[name] != getattr(identity, name):
      raise _mismatch(path, name, metadata[name], getattr(identity, name))


def _mismatch(path, name: str, found: str | None, expected: str) -> ValueError:
  def short(text):
    return repr(text if len(text) <= 40 else text[:16] + "...")

  shown = "none" if found is None else short(found)
  return ValueError(
    f"{path}: {name}: the file has {shown}, expected {short(expected)}"
  )


def _has_function(text: str, identity: Identity) -> bool:
  """Tests that a config, perhaps without newer fields, is of this model."""
  try:
    config = config_json.from_dict(ModelConfig, json.loads(text), "model")
  except (ValueError, RecursionError):
    return False
  return function_of(config) == identity.function


@functools.lru_cache(maxsize=64)
def _abstract_state(
  config: ModelConfig, batch_size: int, max_length: int
) -> State:
  return jax.eval_shape(lambda: init_state(config, batch_size, max_length))


def _named(state: State) -> dict[str, Any]:
  """Leaves by name, in the order of the tree."""
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): leaf
    for path, leaf in leaves
  }


def _with_slots(state: State, count: int) -> State:
  """Resizes the keys and values of full attention, on the host."""

  def resized(x):
    x = x[..., :count, :]
    return np.pad(
      x, (*[(0, 0)] * (x.ndim - 2), (0, count - x.shape[-2]), (0, 0))
    )

  def resize(part):
    if not isinstance(part, KVCache):
      return part
    return part.replace(k=resized(part.k), v=resized(part.v))

  return state.replace(cache=tuple(resize(part) for part in state.cache))


def _recurrent(tensors) -> list[str]:
  """Names of the recurrent states S."""
  return [name for name in tensors if name.endswith(".state")]


def _digest(metadata, tensors) -> str:
  rest = {k: v for k, v in metadata.items() if k != "digest"}
  text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
  return hash_text(text + hash_tensors(tensors))


def _difference(found: str, expected: str) -> str:
  """Describes the first field in which two configs as JSON differ."""
  try:
    found, expected = _flat(json.loads(found)), _flat(json.loads(expected))
  except (ValueError, RecursionError):
    return "its config is unreadable"
  for name in sorted(set(found) | set(expected)):
    if found.get(name) != expected.get(name):
      return f"{name}={found.get(name)!r}, expected {expected.get(name)!r}"
  return "no field differs"


def _flat(tree, prefix="model"):
  if not isinstance(tree, dict):
    return {prefix: tree}
  return {
    name: value
    for key, part in tree.items()
    for name, value in _flat(part, f"{prefix}.{key}").items()
  }
