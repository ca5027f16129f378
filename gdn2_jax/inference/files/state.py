"""States as files: exact, or refused.

One safetensors file per state. Its tensors are the leaves of the state,
"cache.0.state", "cache.0.conv_q", ..., "position", bit for bit; of the keys and
values of full attention only the slots in use. Its metadata:

  format, version   of this layout
  model, config     hash of the fields that decide the model's function, and
                    these fields; one that the file lacks has its default
  weights           hash of the parameters
  tokenizer         hash of the tokenizer, "" without one
  positions         tokens read by each row
  dtype             of the recurrent states in the file
  session           fields of a conversation (`session.py`), "" for a bare state
  digest            SHA-256 over all of the above and every bit of the tensors

All of it is checked, the header before any tensor is read, and a state is
returned whole or not at all. The digest finds damage, not forgery: a
program that can write the file can also write its digest.
"""

import functools
import json
import os
import pathlib
import re

import jax
import numpy as np

from gdn2_jax import config_json
from gdn2_jax.files import remove_leftovers, sha256_bytes
from gdn2_jax.inference.checks import require_alive, require_count
from gdn2_jax.inference.identity import Identity, function_of, hash_tensors
from gdn2_jax.inference.state import State, init_state
from gdn2_jax.interop.disk import regular_size
from gdn2_jax.interop.header import Header, read_header
from gdn2_jax.interop.tensors import save_tensors
from gdn2_jax.interop.tree import check_tensors, leaves_by_path
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.lm import has_growing_cache
from gdn2_jax.model.mixers.kv_cache import KVCache

FORMAT = "gdn2_jax.state"
VERSION = "1"

_DTYPES = ("float32", "bfloat16")
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
    path: file to write, usually *.safetensors; an existing one is replaced.
    state: state of B sequences; stays usable.
    identity: identity of its model, from `identify`.
    dtype: dtype of the recurrent states in the file. "float32" keeps every bit;
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
    path: file to read; that of a session gives its state alone.
    identity: identity of the model that is to continue, from `identify`.
    room: tokens that the longest row may read from here on, for models with
      full attention (pattern "A"); others ignore it.

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
  """`save_state` with the fields of a session, as text."""
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
  tensors = leaves_by_path(_with_slots(state, max(1, *positions)), ".")
  for name in _recurrent(tensors):
    with np.errstate(invalid="ignore"):  # a NaN stays one
      tensors[name] = tensors[name].astype(dtype, copy=False)
  metadata = _metadata(identity, json.dumps(positions), dtype, session)
  metadata["digest"] = _digest(metadata, tensors)
  save_tensors(path, tensors, metadata)


def remove_leftovers_of(path: str | os.PathLike) -> None:
  """Removes temporary files that killed writers of this file left beside it."""
  path = pathlib.Path(path)
  remove_leftovers(path.parent, re.escape(path.name))


def read_state(
  path: str | os.PathLike, identity: Identity, room: int
) -> tuple[State, str]:
  """`load_state`, and the text that `write_state` kept beside the state."""
  path = pathlib.Path(path)
  require_count("room", room, 0)
  header = _read_header(path)
  metadata, entries = header.metadata, header.tensors
  _check_metadata(path, metadata, identity)
  positions = _positions(path, metadata["positions"])
  longest = max(1, *positions)
  # Without full attention the length decides no shape: one entry serves all.
  max_length = longest if has_growing_cache(identity.config) else 1
  abstract = _abstract_state(identity.config, len(positions), max_length)
  specs = leaves_by_path(abstract, ".")
  for name in _recurrent(specs):
    specs[name] = jax.ShapeDtypeStruct(specs[name].shape, metadata["dtype"])
  check_tensors(entries, specs, str(path))

  tensors = {name: np.asarray(entry) for name, entry in entries.items()}
  digest = _digest(metadata, tensors)
  if metadata["digest"] != digest:
    found = metadata["digest"]
    expected = f"{_quote(digest)} for its content"
    raise _mismatch(path, "damaged: digest", found, expected)
  read = tensors["position"].tolist()
  if read != positions:
    expected = f"{_quote(str(read))} as in its tensor"
    raise _mismatch(path, "positions", metadata["positions"], expected)
  for name in _recurrent(tensors):
    tensors[name] = tensors[name].astype(np.float32, copy=False)
  state = jax.tree.unflatten(
    jax.tree.structure(abstract), [tensors[name] for name in specs]
  )
  return jax.device_put(_with_slots(state, longest + room)), metadata["session"]


def _read_header(path: pathlib.Path) -> Header:
  """Metadata and unread tensors; a header that no state has is not parsed."""
  size = regular_size(path)
  with open(path, "rb") as file:
    length = int.from_bytes(file.read(8), "little")
  if _MAX_HEADER_BYTES < length <= size:
    raise ValueError(
      f"{path}: not a state: a header of {length:,} bytes, expected at most "
      f"{_MAX_HEADER_BYTES:,}"
    )
  return read_header(path)


def _metadata(
  identity: Identity, positions: str, dtype: str, session: str
) -> dict[str, str]:
  """All metadata of a file but its digest."""
  return {
    "format": FORMAT,
    "version": VERSION,
    "model": identity.model,
    "config": identity.function,
    "weights": identity.weights,
    "tokenizer": identity.tokenizer,
    "positions": positions,
    "dtype": dtype,
    "session": session,
  }


def _check_metadata(path, found: dict[str, str], identity: Identity) -> None:
  """Refuses other fields, another format, model, weights or tokenizer."""
  expected = _metadata(identity, "", "", "")
  for name in ("format", "version"):
    if found.get(name) != expected[name]:
      raise _mismatch(path, name, found.get(name), _quote(expected[name]))
  if wrong := sorted({*expected, "digest"} ^ set(found)):
    wrong = ", ".join(wrong)
    raise ValueError(f"{path}: metadata: missing or unexpected: {wrong}")
  for name in ("model", "weights", "tokenizer"):
    if found[name] == expected[name]:
      continue
    more = ""
    if name == "model":
      if _has_function(found["config"], identity):
        continue
      more = ": " + _difference(found["config"], identity.function)
    raise _mismatch(path, name, found[name], _quote(expected[name]) + more)
  if found["dtype"] not in _DTYPES:
    raise _mismatch(path, "dtype", found["dtype"], f"one of {_DTYPES}")


def _has_function(text: str, identity: Identity) -> bool:
  """True for a config from before some field existed, but of this model."""
  try:
    config = config_json.from_json(ModelConfig, text)
  except ValueError:
    return False
  return function_of(config) == identity.function


@functools.lru_cache(maxsize=64)
def _abstract_state(
  config: ModelConfig, batch_size: int, max_length: int
) -> State:
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
    raise _mismatch(path, "positions", text, "a list of numbers of tokens")
  return found


def _with_slots(state: State, count: int) -> State:
  """The state with `count` slots for keys and values, on the host."""

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
  return sha256_bytes((text + hash_tensors(tensors)).encode())


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


def _mismatch(path, name, found: str | None, expected: str) -> ValueError:
  return ValueError(
    f"{path}: {name}: the file has {_quote(found)}, expected {expected}"
  )


def _quote(text: str | None) -> str:
  """A value of a file, short enough for one line."""
  if text is None:
    return "none"
  return repr(text if len(text) <= 40 else text[:16] + "...")
