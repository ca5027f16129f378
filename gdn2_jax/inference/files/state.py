"""States as files: exact, or refused.

One safetensors file per state. Its tensors are the leaves of the state,
"cache.0.state", "cache.0.conv_q", ..., "position", bit for bit; of the keys and
values of full attention only the slots in use. Its metadata says what it is and
whom it belongs to:

  format, version   of this layout
  model, config     hash of what decides the model's function, and that itself;
                    a field that the file does not know has its default
  weights           hash of the parameters
  tokenizer         hash of the tokenizer, "" without one
  positions         tokens seen by each row
  dtype             of the recurrent states in the file
  session           of a conversation, "" for a bare state; see `session.py`
  digest            SHA-256 over all of the above and every bit of the tensors

All of it is checked, the header before any tensor is read, and a state is
returned whole or not at all. The digest finds damage, not forgery: whoever can
write the file can also write its digest.
"""

import contextlib
import functools
import json
import os
import pathlib
import re
import struct
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
from gdn2_jax.interop.disk import regular_size
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
_LEFTOVER_SECONDS = 600.0  # since its last byte
_MAX_HEADER_BYTES = 4 << 20  # positions of 300,000 rows fit


def save_state(
  path: str | os.PathLike,
  state: State,
  identity: Identity,
  *,
  dtype: str = "float32",
) -> None:
  """Writes a state of any number of rows, whole or not at all.

  Args:
    path: to write, usually *.safetensors; an existing file is replaced.
    state: of B sequences; stays usable.
    identity: of the model that made it, from `identify`.
    dtype: of the recurrent states in the file. "float32" keeps every bit;
      "bfloat16" halves them and rounds: what follows is then close, not equal.

  Raises:
    ValueError: a state of another model, a donated one, or an unknown dtype.
    OSError: the file cannot be written; an old one is as it was.
  """
  write_state(path, state, identity, dtype=dtype)
  remove_leftovers_of(path)


def load_state(
  path: str | os.PathLike, identity: Identity, *, room: int = 0
) -> State:
  """Reads what `save_state` wrote, onto the default device.

  Args:
    path: of the file; that of a session gives its state alone.
    identity: of the model that is to go on, from `identify`.
    room: tokens that the longest row may read from here on; for models with
      layers "A", ignored by the others.

  Raises:
    FileNotFoundError: no such file.
    ValueError: not such a file, truncated, changed, or of another model,
      weights or tokenizer: the message names the field, what the file has and
      what was expected. Or room < 0.
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
  """`save_state` with a text to keep beside the state."""
  require_alive(state)
  if dtype not in _DTYPES:
    raise ValueError(f"dtype={dtype!r}: expected one of {_DTYPES}")
  if function_of(state.config) != identity.function:
    raise ValueError(
      "state: of another model than identity: "
      + _difference(function_of(state.config), identity.function)
    )
  state = jax.device_get(state)
  positions = state.position.tolist()
  if min(positions) < 0:
    raise ValueError(f"state: position={positions}: expected >= 0")
  tensors = _named(_with_slots(state, max(1, *positions)))
  for name in _recurrent(tensors):
    with np.errstate(invalid="ignore"):  # a NaN stays one
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


def remove_leftovers_of(path: str | os.PathLike) -> None:
  """Removes what writers of this file left beside it when they were killed."""
  path = pathlib.Path(path)
  name = re.escape(f".{path.name}.tmp-") + "[0-9a-f]+"
  remove_leftovers(path.parent, re.compile(name))


def remove_leftovers(folder: pathlib.Path, names: re.Pattern[str]) -> None:
  """Removes files of such names, unless a living writer may be at work."""
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
  """`load_state`, and the text that was kept beside the state."""
  path = pathlib.Path(path)
  if room < 0:
    raise ValueError(f"room: expected >= 0, got {room}")
  metadata, entries = _read_header(path)
  _check_identity(path, metadata, identity)
  positions = _positions(path, metadata["positions"])
  if metadata["dtype"] not in _DTYPES:
    raise ValueError(
      f"{path}: dtype: the file has {_quote(metadata['dtype'])}, expected one "
      f"of {_DTYPES}"
    )
  longest = max(1, *positions)
  abstract = _abstract_state(identity.config, len(positions), longest)
  specs = _named(abstract)
  for name in _recurrent(specs):
    specs[name] = jax.ShapeDtypeStruct(specs[name].shape, metadata["dtype"])
  check_tensors(entries, specs, str(path))

  tensors = {name: np.asarray(entry) for name, entry in entries.items()}
  expected = _digest(metadata, tensors)
  if metadata["digest"] != expected:
    raise ValueError(
      f"{path}: damaged: digest: the file has {metadata['digest'][:16]}, "
      f"expected {expected[:16]} for its content"
    )
  if tensors["position"].tolist() != positions:
    raise ValueError(
      f"{path}: positions: the file has {_quote(metadata['positions'])}, "
      f"expected {_quote(str(tensors['position'].tolist()))} as in its tensor"
    )
  for name in _recurrent(tensors):
    tensors[name] = tensors[name].astype(np.float32, copy=False)
  state = jax.tree.unflatten(
    jax.tree.structure(abstract), [tensors[name] for name in specs]
  )
  return jax.device_put(_with_slots(state, longest + room)), metadata["session"]


def _read_header(path):
  """Metadata with exactly our fields, and the tensors, not read yet."""
  size = regular_size(path)
  with open(path, "rb") as file:
    start = file.read(8)
  # Before a header is parsed that no state can have.
  length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
  if _MAX_HEADER_BYTES < length <= size:
    raise ValueError(
      f"{path}: not a state: a header of {length:,} bytes, expected at most "
      f"{_MAX_HEADER_BYTES:,}"
    )
  header = read_header(path)
  metadata = header.metadata
  for name, expected in (("format", FORMAT), ("version", VERSION)):
    found = metadata.get(name)
    if found != expected:
      raise ValueError(
        f"{path}: {name}: the file has {_quote(found)}, expected {expected!r}"
      )
  if set(metadata) != _FIELDS:
    wrong = ", ".join(sorted(_FIELDS ^ set(metadata)))
    raise ValueError(f"{path}: metadata: missing or unexpected: {wrong}")
  return metadata, header.tensors


def _check_identity(path, metadata, identity: Identity) -> None:
  for name in ("model", "weights", "tokenizer"):
    found, expected = metadata[name], getattr(identity, name)
    if found == expected:
      continue
    more = ""
    if name == "model":
      if _has_function(metadata["config"], identity):
        continue
      more = ": " + _difference(metadata["config"], identity.function)
    raise ValueError(
      f"{path}: {name}: the file has {_quote(found)}, expected "
      f"{_quote(expected)}{more}"
    )


def _abstract_state(
  config: ModelConfig, batch_size: int, max_length: int
) -> State:
  # Where the length decides no shape, one entry serves all lengths.
  return _cached_abstract_state(
    config, batch_size, max_length if "A" in config.pattern else 1
  )


def _has_function(text: str, identity: Identity) -> bool:
  """Whether a config written before some field existed means this model."""
  try:
    config = config_json.from_dict(ModelConfig, json.loads(text), "model")
  except (ValueError, RecursionError):
    return False
  return function_of(config) == identity.function


@functools.lru_cache(maxsize=64)
def _cached_abstract_state(config, batch_size, max_length) -> State:
  return jax.eval_shape(lambda: init_state(config, batch_size, max_length))


def _positions(path, text: str) -> list[int]:
  try:
    found = json.loads(text)
  except (ValueError, RecursionError):
    found = None
  if (
    not isinstance(found, list)
    or not found
    or not all(type(n) is int and 0 <= n < 1 << 31 for n in found)
  ):
    raise ValueError(
      f"{path}: positions: the file has {_quote(text)}, expected a list of "
      "numbers of tokens"
    )
  return found


def _named(state: State) -> dict[str, Any]:
  """Leaves by name, in the order of the tree."""
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): leaf
    for path, leaf in leaves
  }


def _with_slots(state: State, count: int) -> State:
  """The state with so many slots for keys and values, on the host."""

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
  """The first field in which two configs as JSON differ."""
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


def _quote(text: str | None) -> str:
  """A value of a file, short enough for one line."""
  if text is None:
    return "none"
  return repr(text if len(text) <= 40 else text[:16] + "...")
