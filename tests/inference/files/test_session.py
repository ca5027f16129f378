"""States as files: exact, or refused."""

import dataclasses
import json
import os
import random
import resource
import signal
import struct

import jax
import numpy as np
import pytest

from gdn2_jax.inference.files import state as state_file
from gdn2_jax.inference.files.session import Session, load_session, save_session
from gdn2_jax.inference.files.state import load_state, save_state
from gdn2_jax.inference.identity import identify
from gdn2_jax.inference.state import init_state, prefill
from gdn2_jax.interop.header import read_header
from gdn2_jax.interop.tensors import load_tensors, save_tensors
from gdn2_jax.interop.tree import flatten_params, unflatten_params
from tests.inference.states import (
  CONFIG,
  Words,
  assert_equal,
  identity,
  make_model,
  random_state,
)
from tests.random_params import random_params


@pytest.fixture
def path(tmp_path):
  return tmp_path / "state.safetensors"


@pytest.fixture
def saved(path):
  """The file of a state of two rows."""
  save_state(path, random_state(2), identity())
  return path


@pytest.mark.parametrize("rows", [1, 3])
def test_every_bit_returns(path, rows):
  state = random_state(rows)
  save_state(path, state, identity())
  assert_equal(load_state(path, identity()), state)
  metadata = read_header(path).metadata
  assert metadata["positions"] == json.dumps(state.position.tolist())
  assert metadata["dtype"] == "float32"
  assert os.listdir(path.parent) == [path.name]
  # Equal states give equal files.
  before = path.read_bytes()
  save_state(path, state, identity())
  assert path.read_bytes() == before


@pytest.mark.parametrize("pattern", ["G", "GS", "A"])
def test_prefill_goes_on_from_a_file_as_from_memory(path, pattern):
  model = make_model(pattern)

  def read(state, start, end):
    tokens = np.arange(start, end, dtype=np.int32)[None] * 7 % 61
    lengths = np.array([end - start], np.int32)
    return prefill(model.params, tokens, lengths, state, chunk_size=8)

  # Past the window of 8 at the cut.
  _, state = read(init_state(model.config, 1, 20), 0, 13)
  save_state(path, state, model.identity)
  memory = read(state, 13, 20)
  state = load_state(path, model.identity, room=7)
  assert state.config == model.config
  file = read(state, 13, 20)
  assert_equal(file, memory)
  assert np.isfinite(file[0]).all()


def test_bfloat16_halves_the_recurrent_states_and_nothing_else(path):
  state = init_state(CONFIG, 2)
  rng = np.random.default_rng(0)
  state = jax.tree.map(
    lambda x: abs(rng.normal(size=x.shape) * 100).astype(x.dtype), state
  )
  save_state(path, state, identity(), dtype="bfloat16")
  entries = read_header(path).tensors
  halved = {name for name, e in entries.items() if name.endswith(".state")}
  assert halved == {"cache.0.state"}
  assert entries["cache.0.state"].dtype.itemsize == 2
  got = load_state(path, identity())
  exact, rounded = state.cache[0].state, got.cache[0].state
  assert rounded.dtype == np.float32
  error = np.abs(rounded - exact) / np.abs(exact)
  assert 0 < error.max() <= 2.0**-8
  assert_equal(
    got.replace(cache=jax.tree.map(lambda x: x, got.cache)),
    state.replace(
      cache=(
        dataclasses.replace(state.cache[0], state=rounded),
        *state.cache[1:],
      )
    ),
  )


def test_a_state_belongs_to_one_function_weights_and_tokenizer(saved):
  params = random_params(CONFIG)
  flat = flatten_params(params, CONFIG)
  other = dataclasses.replace
  unscanned = other(
    CONFIG, scan_layers=False, scan_unroll=0, remat="full", loss_chunk=7
  )
  unscanned.gdn2 = other(CONFIG.gdn2, implementation="reference")
  same = identify(unflatten_params(flat, unscanned), unscanned, Words())
  assert (same.model, same.weights) == (identity().model, identity().weights)
  assert_equal(load_state(saved, same).replace(config=CONFIG), random_state(2))

  # One bit of one weight.
  name = "layers.2.mixer.A_log"
  flat[name] = flat[name].copy()
  flat[name].view(np.uint32)[0] ^= 1
  retrained = identify(unflatten_params(flat, CONFIG), CONFIG, Words())
  narrower = other(CONFIG, attention=other(CONFIG.attention, window=4))
  belongs = identity()
  cases = [
    (retrained, f"weights: .*{belongs.weights[:8]}.*{retrained.weights[:8]}"),
    (
      other(belongs, tokenizer=""),
      "tokenizer: the file has '5e5e.*expected ''",
    ),
    (other(belongs, config=narrower), r"window=8, expected 4"),
    (other(belongs, config=other(CONFIG, norm_eps=1e-6)), r"model.norm_eps="),
    (other(belongs, config=other(CONFIG, dtype="float32")), "model.dtype="),
  ]
  for stranger, message in cases:
    with pytest.raises(ValueError, match=message):
      load_state(saved, stranger)
  with pytest.raises(ValueError, match="state: of another model than identity"):
    save_state(saved, random_state(1), cases[2][0])
  with pytest.raises(ValueError, match="dtype='float16': expected one of"):
    save_state(saved, random_state(1), belongs, dtype="float16")
  assert_equal(load_state(saved, belongs), random_state(2))


def test_a_flipped_bit_anywhere_is_seen(saved):
  data = saved.read_bytes()
  header = 8 + struct.unpack("<Q", data[:8])[0]
  rng = random.Random(0)
  assert header < 2500
  places = [*range(8), *rng.sample(range(8, header), 300)]
  for place in [*places, *rng.sample(range(header, len(data)), 50)]:
    damaged = bytearray(data)
    damaged[place] ^= 1 << rng.randrange(8)
    saved.write_bytes(damaged)
    with pytest.raises(ValueError, match=saved.name):
      load_state(saved, identity())
  saved.write_bytes(data)
  assert_equal(load_state(saved, identity()), random_state(2))


def test_pieces_of_files_and_other_files_are_refused(saved, tmp_path):
  data = saved.read_bytes()
  header = 8 + struct.unpack("<Q", data[:8])[0]
  for length in (0, 1, 7, 8, 9, header - 1, header, header + 1, len(data) - 1):
    saved.write_bytes(data[:length])
    with pytest.raises(ValueError, match=saved.name):
      load_state(saved, identity())
  saved.write_bytes(data + b"\0")
  with pytest.raises(ValueError, match="something was added"):
    load_state(saved, identity())
  with pytest.raises(FileNotFoundError, match="no such file"):
    load_state(tmp_path / "none.safetensors", identity())
  with pytest.raises(ValueError, match="not a regular file"):
    load_state(tmp_path, identity())
  saved.write_bytes(b"\x80\x04\x95" + data)
  with pytest.raises(ValueError, match="a pickle"):
    load_state(saved, identity())
  save_tensors(saved, {"head": np.zeros(3, np.float32)})
  with pytest.raises(ValueError, match="format: the file has none"):
    load_state(saved, identity())


def test_a_header_that_no_state_has_is_not_parsed(path, monkeypatch):
  def parse(*_):
    raise AssertionError("parsed")

  monkeypatch.setattr(state_file, "read_header", parse)
  with open(path, "wb") as file:
    file.write(struct.pack("<Q", 50 << 20))
    file.truncate(60 << 20)
  with pytest.raises(ValueError, match="header of 52,428,800 bytes"):
    load_state(path, identity())


def forge(path, change):
  """Rewrites the file after `change(tensors, metadata)`, digest included."""
  tensors, metadata = load_tensors(path), dict(read_header(path).metadata)
  change(tensors, metadata)
  if "digest" in metadata:
    metadata["digest"] = state_file._digest(metadata, tensors)
  save_tensors(path, tensors, metadata)


def older(metadata, field):
  """Removes a field from the config, as in a file from before it existed."""
  config = json.loads(metadata["config"])
  del config[field]
  metadata.update(config=json.dumps(config), model="0")


def newer(metadata, field, value):
  config = {**json.loads(metadata["config"]), field: value}
  metadata.update(config=json.dumps(config), model="0")


def test_files_from_before_a_field_existed_mean_its_default(saved):
  assert CONFIG.norm_eps == 1e-5  # its default
  forge(saved, lambda _, m: older(m, "norm_eps"))
  assert_equal(load_state(saved, identity()), random_state(2))


def test_files_that_only_their_digest_makes_look_right(saved, monkeypatch):
  ring = "cache.1.k"
  cases = [
    (lambda t, _: t.pop(ring), "missing cache.1.k"),
    (lambda t, _: t.update(x=t[ring]), "unexpected x"),
    (lambda t, _: t.update({ring: t[ring][:, :1]}), r"cache.1.k: bfloat16\["),
    (lambda t, _: t.update({ring: t[ring].astype(np.float32)}), "float32"),
    (lambda _, m: m.pop("weights"), "missing or unexpected: weights"),
    (lambda _, m: m.update(x=""), "missing or unexpected: x"),
    (lambda _, m: m.update(version="2"), "version: the file has '2', expected"),
    (lambda _, m: m.update(format="x"), "format: the file has 'x', expected"),
    (lambda _, m: m.update(dtype="float16"), "dtype: the file has 'float16'"),
    (lambda _, m: m.update(dtype="bfloat16"), "cache.0.state: float32"),
    (lambda _, m: m.update(positions="[]"), "positions: the file has"),
    (lambda _, m: m.update(positions="[-1, 2]"), "positions: the file has"),
    (lambda _, m: m.update(positions="[true, 2]"), "positions: the file has"),
    (lambda _, m: m.update(positions="[" * 9999), "positions: the file has"),
    (lambda _, m: m.update(positions="[1]"), "not those of this model"),
    (lambda _, m: m.update(positions="[1, 2]"), "positions: the file has"),
    (lambda _, m: m.update(model="0", config="{"), "its config is unreadable"),
    (lambda _, m: m.update(model="0", config="[]"), "model: the file has '0'"),
    (lambda _, m: older(m, "num_layers"), "model.num_layers=None, expected 4"),
    (lambda _, m: newer(m, "sinks", 4), "model.sinks=4, expected None"),
  ]
  good = saved.read_bytes()
  # Nothing of these may reach a device.
  monkeypatch.setattr(jax, "device_put", None)
  for change, message in cases:
    saved.write_bytes(good)
    forge(saved, change)
    with pytest.raises(ValueError, match=message):
      load_state(saved, identity())


def test_a_save_that_fails_leaves_the_old_file(saved, monkeypatch):
  class Killed(BaseException):
    pass

  def fail(*_):
    raise Killed

  for step in ("fsync", "replace"):
    with monkeypatch.context() as patch:
      patch.setattr(os, step, fail)
      with pytest.raises(Killed):
        save_state(saved, random_state(1, seed=1), identity())
    assert_equal(load_state(saved, identity()), random_state(2))
    assert os.listdir(saved.parent) == [saved.name]

  # What kill -9 leaves behind goes with the next save, in time.
  dead, alive = (saved.with_name(f".{saved.name}.tmp.{n}") for n in "01")
  for path in (dead, alive):
    path.touch()
  os.utime(dead, (0, 0))
  save_state(saved, random_state(2), identity())
  assert set(saved.parent.iterdir()) == {saved, alive}


def test_a_full_disk_is_an_os_error_and_leaves_the_old_file(saved):
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
  try:
    with pytest.raises(OSError, match="cannot be written"):
      save_state(saved, random_state(1, seed=1), identity())
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)
  assert_equal(load_state(saved, identity()), random_state(2))
  assert os.listdir(saved.parent) == [saved.name]


def test_sessions_keep_what_a_conversation_needs(path):
  session = Session(
    state=random_state(1), pending=60, draws=7, seed=2**32 - 1, tail=(3, 60)
  )
  for kept in (session, dataclasses.replace(session, pending=None, tail=())):
    save_session(path, kept, identity())
    got = load_session(path, identity())
    assert_equal(got.state, kept.state)
    assert dataclasses.replace(got, state=kept.state) == kept
  assert_equal(load_state(path, identity()), session.state)
  old = path.read_bytes()
  wrong = [
    ({"pending": 61}, r"pending=61: expected an integer in \[0, 61\)"),
    ({"draws": -1}, "draws=-1"),
    ({"seed": 2**32}, "seed=4294967296"),
    ({"tail": (3, 61)}, "tail=61"),
    ({"state": random_state(2)}, "expected the state of one sequence, got 2"),
    ({"state": None}, "expected the state of one sequence, got None"),
  ]
  for change, message in wrong:
    with pytest.raises(ValueError, match=message):
      save_session(path, dataclasses.replace(session, **change), identity())
  assert path.read_bytes() == old
  forged = [
    ('{"pending":true,"draws":1,"seed":1,"tail":[]}', "pending=True"),
    ('{"pending":1,"draws":1.0,"seed":1,"tail":[]}', "draws=1.0"),
    ('{"pending":1,"draws":1,"seed":1,"tail":{}}', "tail={}"),
    ('{"pending":1,"draws":1,"seed":1}', "unexpected fields"),
    ("[]", "expected a JSON object"),
  ]
  for text, message in forged:
    path.write_bytes(old)
    forge(path, lambda _, m: m.update(session=text))  # noqa: B023
    with pytest.raises(ValueError, match=message):
      load_session(path, identity())
  save_state(path, session.state, identity())
  with pytest.raises(ValueError, match="session: the file has none"):
    load_session(path, identity())
