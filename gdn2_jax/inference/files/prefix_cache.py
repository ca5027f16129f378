"""Prefix cache on disk: states after common beginnings of prompts.

A folder of state files (`state.py`), each named by the number of tokens and a
hash of model, weights, tokenizer and tokens, so that no model finds states of
another one. Processes and threads may share a folder: a file appears whole or
not at all, and one that is evicted while it is read is either read whole or
counts as missing. Only files of such names, and the temporary files of killed
writers, are ever touched.
"""

import contextlib
import fcntl
import hashlib
import os
import pathlib
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from gdn2_jax.files import remove_leftovers, replacing
from gdn2_jax.inference.checks import require_ids
from gdn2_jax.inference.files.state import load_state, write_state
from gdn2_jax.inference.identity import Identity
from gdn2_jax.inference.state import CHUNK_SIZE, State, init_state, prefill

_ENTRY = re.compile(r"(\d{10})-[0-9a-f]{64}\.safetensors")
_LOCK = ".lock"


class StateStore:
  """States by the tokens they have read, in a folder of bounded size.

  Args:
    folder: folder of the entries; made if it is missing.
    identity: identity of the model, from `identify`; one folder may serve many.
    max_bytes: size of all entries together, >= 1; the least recently used ones
      are removed first.
    dtype: dtype of the recurrent states in the files. With "bfloat16" twice as
      many fit, and what follows a hit is close to what follows a miss, not
      equal.

  Raises:
    ValueError: max_bytes < 1, or a folder that is a file.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    identity: Identity,
    max_bytes: int,
    *,
    dtype: str = "float32",
  ):
    if max_bytes < 1:
      raise ValueError(f"max_bytes: expected >= 1, got {max_bytes}")
    self.identity = identity
    self._folder = pathlib.Path(folder)
    self._max_bytes = max_bytes
    self._dtype = dtype
    if self._folder.exists() and not self._folder.is_dir():
      raise ValueError(f"folder={os.fspath(folder)!r}: not a folder")
    self._folder.mkdir(parents=True, exist_ok=True)

  def put(self, tokens: Any, state: State) -> None:
    """Keeps the state of one sequence that has read exactly these tokens.

    An entry that exists is not written again. The least recently used entries
    make room.

    Args:
      tokens: ids of all tokens that `state` has read.
      state: state of one sequence; stays usable.

    Raises:
      ValueError: no token, an id outside the vocabulary, a state of another
        model, of several rows or after another number of tokens, or one that
        is larger than max_bytes.
      OSError: the folder cannot be written to, or its disk is full.
    """
    tokens = _ids(tokens, self.identity)
    if state.position.shape != (1,):
      raise ValueError(
        f"state: expected one sequence, got {state.position.shape[0]}; "
        "unbatch it first"
      )
    if int(state.position[0]) != len(tokens):
      raise ValueError(
        f"state: has read {int(state.position[0])} tokens, expected the "
        f"{len(tokens)} of tokens"
      )
    ((_, path),) = self._paths(tokens, [len(tokens)])
    if _touch(path):
      return
    # The lock is left last: the entry takes its place under it.
    with contextlib.ExitStack() as locked, replacing(path) as new:
      write_state(new, state, self.identity, dtype=self._dtype)
      size = new.stat().st_size
      if size > self._max_bytes:
        raise ValueError(
          f"state: {size:,} bytes as a file, expected at most "
          f"max_bytes={self._max_bytes:,}"
        )
      locked.enter_context(self._locked())
      self._make_room(size)

  def get(self, tokens: Any, *, room: int = 0) -> State | None:
    """The state after exactly these tokens, or None.

    Args:
      tokens: ids that it has read.
      room: tokens that may follow, as for `load_state`.

    Raises:
      ValueError: no token, or an id outside the vocabulary.
    """
    tokens = _ids(tokens, self.identity)
    ((_, path),) = self._paths(tokens, [len(tokens)])
    return self._load(path, len(tokens), room)

  def longest_prefix(
    self, tokens: Any, *, room: int = 0
  ) -> tuple[int, State] | None:
    """The state after the longest beginning of these tokens.

    Args:
      tokens: ids of a prompt.
      room: tokens that may follow all of `tokens`, as for `load_state`.

    Returns:
      Number of tokens that the state has read, and the state; None without one.

    Raises:
      ValueError: no token, or an id outside the vocabulary.
    """
    tokens = _ids(tokens, self.identity)
    names = {entry.name for entry in self._entries()}
    lengths = sorted({int(name[:10]) for name in names})
    candidates = self._paths(tokens, [n for n in lengths if n <= len(tokens)])
    for length, path in reversed(candidates):
      if path.name not in names:
        continue
      state = self._load(path, length, len(tokens) - length + room)
      if state is not None:
        return length, state
    return None

  def _paths(
    self, tokens: np.ndarray, lengths: Sequence[int]
  ) -> list[tuple[int, pathlib.Path]]:
    """(n, file of the first n tokens) for ascending lengths, in one pass."""
    identity = self.identity
    key = (identity.model, identity.weights, identity.tokenizer, self._dtype)
    running = hashlib.sha256("\n".join(key).encode())
    data, done, paths = tokens.astype("<i4"), 0, []
    for n in lengths:
      running.update(data[done:n])
      done = n
      name = f"{n:010d}-{running.hexdigest()}.safetensors"
      paths.append((n, self._folder / name))
    return paths

  def _load(self, path: pathlib.Path, length: int, room: int) -> State | None:
    if not _touch(path):
      return None
    try:
      state = load_state(path, self.identity, room=room)
      if state.position.tolist() != [length]:
        raise ValueError(f"{path}: not a state after {length} tokens")
    except FileNotFoundError:
      return None  # evicted meanwhile
    except ValueError as e:
      warnings.warn(f"dropped from the state store: {e}", stacklevel=3)
      with contextlib.suppress(OSError):
        path.unlink()
      return None
    except OSError as e:
      warnings.warn(f"unreadable in the state store: {e}", stacklevel=3)
      return None
    return state

  def _entries(self) -> Iterator[os.DirEntry]:
    with os.scandir(self._folder) as found:
      for entry in found:
        if _ENTRY.fullmatch(entry.name):
          yield entry

  @contextlib.contextmanager
  def _locked(self) -> Iterator[None]:
    """Excludes other writers, in any thread of any process."""
    with open(self._folder / _LOCK, "ab") as file:
      fcntl.flock(file, fcntl.LOCK_EX)
      yield

  def _make_room(self, size: int) -> None:
    """Removes entries until `size` more bytes fit, the oldest use first."""
    found = []
    for entry in self._entries():
      with contextlib.suppress(FileNotFoundError):  # dropped meanwhile
        if entry.is_file(follow_symlinks=False):
          stat = entry.stat(follow_symlinks=False)
          found.append((stat.st_mtime_ns, stat.st_size, entry.path))
    total = size + sum(size for _, size, _ in found)
    for _, freed, path in sorted(found):
      if total <= self._max_bytes:
        break
      pathlib.Path(path).unlink(missing_ok=True)
      total -= freed
    remove_leftovers(self._folder, _ENTRY.pattern)


def prefill_cached(
  params: Any,
  tokens: Any,  # ids as a list or on the host, checked by name below
  store: StateStore,
  *,
  every: int = CHUNK_SIZE,
  chunk_size: int = CHUNK_SIZE,
  room: int = 0,
) -> tuple[Float[Array, "1 VOCAB"], State, int]:
  """`prefill` of one prompt that reads only tokens after a cached prefix.

  Keeps a state after every `every` tokens. If the store has no others, the
  result is bit for bit that of `prefill`, hit or miss: the chunks are the same.
  After `store.put` of other lengths it is equal up to rounding.

  Args:
    params: unboxed parameters of the model of `store.identity`.
    tokens: ids of the prompt.
    store: states to search and to add to; a full disk is a warning.
    every: tokens between the states that are kept, a multiple of chunk_size.
    chunk_size: tokens per dispatch, as for `prefill`.
    room: tokens that may follow; models without full attention ignore it.

  Returns:
    float32 logits [1, VOCAB] after the last token, the state, and the number
    of tokens that were not read again.

  Raises:
    ValueError: no token, an id outside the vocabulary, or an `every` that is
      no multiple of chunk_size.
  """
  if chunk_size < 1 or every < 1 or every % chunk_size:
    raise ValueError(
      f"every={every}: expected a positive multiple of chunk_size={chunk_size}"
    )
  tokens = _ids(tokens, store.identity)
  # Not all of them: states are kept, but the logits of the last token are not.
  found = None
  if len(tokens) > 1:
    found = store.longest_prefix(tokens[:-1], room=room + 1)
  if found is None:
    found = 0, init_state(store.identity.config, 1, len(tokens) + room)
  reused, state = found
  start = reused
  while start < len(tokens):
    end = min(len(tokens), start - start % every + every)
    piece = tokens[None, start:end]
    logits, state = prefill(
      params, piece, np.array([end - start]), state, chunk_size=chunk_size
    )
    if end % every == 0:
      try:
        store.put(tokens[:end], state)
      except OSError as e:
        warnings.warn(f"not kept in the state store: {e}", stacklevel=2)
    start = end
  return logits, state, reused


def _ids(tokens: Any, identity: Identity) -> np.ndarray:
  return require_ids("tokens", tokens, identity.config.vocab_size, least=1)


def _touch(path: pathlib.Path) -> bool:
  """Marks an entry as used now; False if it does not exist."""
  now = time.time_ns()
  try:
    os.utime(path, ns=(now, now), follow_symlinks=False)
  except FileNotFoundError:
    return False
  except OSError:
    return path.exists()  # of a folder that may only be read
  return True
