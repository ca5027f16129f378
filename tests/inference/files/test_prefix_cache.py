"""Prefix cache on disk: exact, whole, bounded, shared."""

import dataclasses
import os
import pathlib
import random
import subprocess
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.inference.files import prefix_cache as store_lib
from gdn2_jax.inference.files.prefix_cache import StateStore, prefill_cached
from gdn2_jax.inference.state import init_state, prefill
from tests.inference.states import (
  assert_equal,
  identity,
  make_model,
  random_state,
)

ROOT = pathlib.Path(__file__).parents[3]


def text(key: int) -> list[int]:
  """Tokens that differ for each key."""
  return [key % 61] * (1 + key % 3) + [key // 61]


def state_of(key: int):
  """A state of random bits by key, with the position after its text."""
  position = jnp.array([len(text(key))], jnp.int32)
  return random_state(1, seed=key).replace(position=position)


def entries(folder) -> list[str]:
  return sorted(n for n in os.listdir(folder) if n.startswith("000"))


@pytest.fixture(scope="module")
def size(tmp_path_factory) -> int:
  """Bytes of an entry, which differ by a few."""
  folder = tmp_path_factory.mktemp("size")
  StateStore(folder, identity(), 1 << 30).put(text(0), state_of(0))
  return (folder / entries(folder)[0]).stat().st_size


def test_states_return_by_their_tokens(tmp_path):
  store = StateStore(tmp_path / "new" / "folder", identity(), 1 << 30)
  tokens = [5, 6, 7, 8, 9, 10]
  assert store.get(tokens) is None and store.longest_prefix(tokens) is None
  kept = {}
  for n in (2, 4):
    kept[n] = random_state(1, n).replace(position=jnp.array([n], jnp.int32))
    store.put(tokens[:n], kept[n])
  assert_equal(store.get(tokens[:2]), kept[2])
  assert_equal(store.get(np.array(tokens[:4])), kept[4])
  for other in ([5, 6, 7], [6, 5], [5], tokens):
    assert store.get(other) is None
  for prompt, expected in ((tokens, 4), (tokens[:3], 2), ([5, 6, 7, 9], 2)):
    n, state = store.longest_prefix(prompt)
    assert n == expected
    assert_equal(state, kept[n])
  assert store.longest_prefix([6, 5, 7, 8]) is None
  # What is there is not written again.
  path = store._folder / entries(store._folder)[0]
  inode = path.stat().st_ino
  store.put(tokens[:2], kept[2])
  assert path.stat().st_ino == inode


def test_models_and_dtypes_share_a_folder_and_nothing_else(tmp_path):
  first = StateStore(tmp_path, identity(), 1 << 30)
  first.put(text(1), state_of(1))
  other = dataclasses.replace(identity(), weights="0" * 64)
  rounding = StateStore(tmp_path, identity(), 1 << 30, dtype="bfloat16")
  for stranger in (StateStore(tmp_path, other, 1 << 30), rounding):
    assert stranger.get(text(1)) is None
    assert stranger.longest_prefix(text(1)) is None
    stranger.put(text(1), state_of(1))
  assert len(entries(tmp_path)) == 3
  assert_equal(first.get(text(1)), state_of(1))


def test_the_least_recently_used_makes_room(tmp_path, size):
  room = 3 * size + size // 2
  store = StateStore(tmp_path, identity(), room)
  for key in range(3):
    store.put(text(key), state_of(key))
  assert_equal(store.get(text(0)), state_of(0))
  store.longest_prefix(text(1))
  store.put(text(0), state_of(0))  # a use, too
  store.put(text(3), state_of(3))
  assert [key for key in range(4) if store.get(text(key))] == [0, 1, 3]
  with pytest.raises(ValueError, match=r"bytes as a file, expected at most"):
    StateStore(tmp_path, identity(), size // 2).put(text(4), state_of(4))
  # Nothing made room for what could never fit.
  assert len(entries(tmp_path)) == 3
  StateStore(tmp_path, identity(), size + size // 2).put(text(5), state_of(5))
  assert len(entries(tmp_path)) == 1


def test_damaged_entries_are_dropped_and_never_returned(tmp_path):
  store = StateStore(tmp_path, identity(), 1 << 30)
  tokens = [5, 6, 7, 8]
  for n in (2, 4):
    state = state_of(0).replace(position=jnp.array([n], jnp.int32))
    store.put(tokens[:n], state)
  short, long = (tmp_path / name for name in entries(tmp_path))
  data = bytearray(long.read_bytes())
  data[-1] ^= 1
  long.write_bytes(data)
  with pytest.warns(UserWarning, match="dropped from the state store.*digest"):
    n, _ = store.longest_prefix(tokens)
  assert n == 2 and not long.exists()
  # A good state, but after other tokens.
  long.write_bytes(short.read_bytes())
  with pytest.warns(UserWarning, match="not a state after 4 tokens"):
    assert store.get(tokens) is None
  short.write_bytes(b"")
  with pytest.warns(UserWarning, match="dropped"):
    assert store.get(tokens[:2]) is None
  assert entries(tmp_path) == []


def test_nothing_else_is_touched(tmp_path, size):
  folder, outside = tmp_path / "store", tmp_path / "outside.safetensors"
  folder.mkdir()
  outside.write_bytes(b"x" * size)
  foreign = ["notes.txt", "model.safetensors", ".new-0.safetensors"]
  for name in foreign:
    (folder / name).write_bytes(b"x" * size)
  entry = f"{1:010d}-{'0' * 64}.safetensors"
  dead = [f".{entry}.tmp.0", f"..{entry}.tmp.0.tmp.0"]
  alive = f".{entry}.tmp.1"
  for name in [*dead, alive]:
    (folder / name).write_bytes(b"x")
  for name in [*dead, *foreign]:
    os.utime(folder / name, (0, 0))
  store = StateStore(folder, identity(), size + size // 2)
  store.put(text(0), state_of(0))
  linked = next(path for _, path in store._paths(np.array([9]), [1]))
  linked.symlink_to(outside)
  with pytest.warns(UserWarning, match="dropped"):
    store.get([9])
  store.put(text(1), state_of(1))
  left = set(os.listdir(folder))
  assert {*foreign, alive} <= left and not left & set(dead)
  assert outside.read_bytes() == b"x" * size
  assert sorted(os.listdir(tmp_path)) == ["outside.safetensors", "store"]


def test_bad_input_is_refused(tmp_path):
  store = StateStore(tmp_path, identity(), 1 << 30)
  state = state_of(0)
  (tmp_path / "file").touch()
  refusals = [
    (
      lambda: store.put([], state),
      "tokens: expected at least one token, got none",
    ),
    (lambda: store.get([61]), r"ids in \[0, 61\), got 61"),
    (lambda: store.get([0.5]), "tokens: expected integers, got float64"),
    (lambda: store.longest_prefix([0, -1]), r"ids in \[0, 61\), got -1"),
    (lambda: store.put([1], state), "state: has read 2 tokens, expected the 1"),
    (lambda: store.put([1], random_state(2)), "state: expected one sequence"),
    (lambda: StateStore(tmp_path, identity(), 0), "max_bytes: expected >= 1"),
    (lambda: StateStore(tmp_path / "file", identity(), 1), "not a folder"),
    (
      lambda: prefill_cached({}, [1], store, every=12, chunk_size=8),
      "every=12: expected a positive multiple of chunk_size=8",
    ),
  ]
  for refused, message in refusals:
    with pytest.raises(ValueError, match=message):
      refused()
  assert entries(tmp_path) == []


def hammer(folder: pathlib.Path, seed: int, max_bytes: int, rounds: int) -> int:
  """Puts and gets at random, checking all results; returns the hits."""
  store = StateStore(folder, identity(), max_bytes)
  rng, hits = random.Random(seed), 0
  for _ in range(rounds):
    key = rng.randrange(8)
    if rng.random() < 0.4:
      store.put(text(key), state_of(key))
      continue
    state = store.get(text(key))
    if state is not None:
      assert_equal(state, state_of(key))
      hits += 1
    total = 0
    for name in entries(folder):
      try:
        total += (folder / name).stat().st_size
      except FileNotFoundError:
        continue
    assert total <= max_bytes, total
  return hits


@pytest.mark.slow
def test_threads_and_processes_share_a_folder(tmp_path, size):
  room = 4 * size + size // 2  # of eight: some are evicted all the time
  command = f"import pathlib, sys; from {__name__} import hammer"
  command += "; folder, room = sys.argv[1:]"
  command += "; print(hammer(pathlib.Path(folder), 9, int(room), 60))"
  other = subprocess.Popen(
    [sys.executable, "-W", "error", "-c", command, str(tmp_path), str(room)],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    text=True,
  )
  hits, failures = [], []

  def run(seed):
    try:
      # Until the other process has come and gone.
      while other.poll() is None and not failures:
        hits.append(hammer(tmp_path, seed, room, 10))
        time.sleep(0.1)
    except BaseException as e:
      failures.append(e)

  threads = [threading.Thread(target=run, args=(seed,)) for seed in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  out, _ = other.communicate(timeout=60)
  assert not failures, failures
  assert other.returncode == 0 and int(out) > 0 and sum(hits) > 0
  # No leftover, and nothing but entries and the lock.
  assert set(os.listdir(tmp_path)) == {".lock", *entries(tmp_path)}


def test_prefill_reads_only_what_is_new(tmp_path, monkeypatch):
  model = make_model("GS")
  store = StateStore(tmp_path, model.identity, 1 << 30)
  tokens = np.arange(20, dtype=np.int32) * 7 % 61

  def fresh(tokens):
    return prefill(
      model.params,
      tokens[None],
      np.array([len(tokens)]),
      init_state(model.config, 1),
      chunk_size=8,
    )

  def cached(tokens):
    *result, reused = prefill_cached(
      model.params, tokens, store, every=8, chunk_size=8
    )
    return tuple(result), reused

  changed = np.concatenate([tokens[:18], [3, 4, 5]])
  # Missed; hit twice over; after 18 equal tokens; nothing equal; too short.
  cases = [(tokens, 0), (tokens, 16), (changed, 16), (tokens[1:], 0)]
  cases += [(tokens[:16], 8), (tokens[:1], 0)]
  for prompt, expected in cases:
    result, reused = cached(prompt)
    assert reused == expected
    assert_equal(result, fresh(prompt))

  def full(*_, **__):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(store_lib, "write_state", full)
  with pytest.warns(UserWarning, match="not kept in the state store.*No space"):
    result, _ = cached(tokens[2:])
  assert_equal(result, fresh(tokens[2:]))
