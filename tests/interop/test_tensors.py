"""Safetensors: round trips bit for bit, and files that are not let in."""

import json
import struct

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file

from gdn2_jax.interop import tensors as files
from gdn2_jax.interop.header import DTYPES

ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
ONE_TEXT = json.dumps(ONE).encode()
FOUR = b"\0" * 4


def tensors_of(rng):
  return {
    "b.kernel": rng.normal(size=(3, 4)).astype(ml_dtypes.bfloat16),
    "a": rng.normal(size=(2, 3)).T,
    "scalar": np.array(-0.0, np.float32),
    "none": np.zeros((0, 5), np.int32),
    "nan": np.array([np.nan, np.inf], np.float32),
    "jax": jnp.arange(6, dtype=jnp.int32).reshape(2, 3),
  }


def test_others_may_read_what_they_may_read_elsewhere(tmp_path):
  files.save_tensors(tmp_path / "a.safetensors", {"x": np.zeros(1)})
  (tmp_path / "b").touch()
  modes = {path.stat().st_mode for path in tmp_path.iterdir()}
  assert len(modes) == 1


def test_a_full_disk_is_an_os_error_and_leaves_nothing(tmp_path, monkeypatch):
  def full(arrays, path, **_):
    path.write_bytes(b"some of it")
    raise SafetensorError("No space left on device")

  monkeypatch.setattr(files, "save_file", full)
  with pytest.raises(OSError, match=r"a.safetensors: cannot be .*No space"):
    files.save_tensors(tmp_path / "a.safetensors", {"x": np.zeros(1)})
  assert not list(tmp_path.iterdir())


def assert_same(found, expected):
  assert set(found) == set(expected)
  for name, value in expected.items():
    value = np.asarray(value)
    assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
    assert found[name].tobytes() == value.tobytes(), name


def file_of(folder, header, data=b""):
  """A file with any header at all."""
  if not isinstance(header, bytes):
    header = json.dumps(header).encode()
  path = folder / "model.safetensors"
  path.write_bytes(struct.pack("<Q", len(header)) + header + data)
  return path


def test_round_trips_are_bit_equal(tmp_path, rng):
  path = tmp_path / "x.safetensors"
  tensors = tensors_of(rng)
  files.save_tensors(path, tensors, {"z": "1", "a": 'q"\n\u00e9', "m": ""})
  assert_same(files.load_tensors(path), tensors)
  header = files.read_header(path)
  assert header.metadata == {"z": "1", "a": 'q"\n\u00e9', "m": ""}
  assert header.tensors["b.kernel"].shape == (3, 4)
  assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
  # The library, which others will read the file with, agrees.
  assert_same(load_file(path), tensors)


def test_every_dtype_comes_back(tmp_path):
  path = tmp_path / "x.safetensors"
  tensors = {name: np.ones((2,), dtype) for name, dtype in DTYPES.items()}
  files.save_tensors(path, tensors)
  assert_same(files.load_tensors(path), tensors)


def test_equal_input_gives_equal_bytes(tmp_path, rng):
  metadata = {f"key{i}": "value" for i in range(20)}
  written = set()
  for i in range(3):
    path = tmp_path / f"{i}.safetensors"
    files.save_tensors(path, tensors_of(np.random.default_rng(0)), metadata)
    written.add(path.read_bytes())
  assert len(written) == 1


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "x.safetensors"
  files.save_tensors(path, {"a": np.ones(3)})
  before = path.read_bytes()

  def full(*args):
    raise OSError("no space left on device")

  monkeypatch.setattr(files.os, "fsync", full)
  with pytest.raises(OSError, match="no space"):
    files.save_tensors(path, {"a": np.zeros(3)})
  assert path.read_bytes() == before
  assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize(
  ("tensors", "metadata", "match"),
  [
    ({"a": np.zeros(2, np.complex64)}, None, "complex64"),
    ({"a": np.array(["x"])}, None, "dtype"),
    ({"__metadata__": np.zeros(2)}, None, "expected a name"),
    ({"": np.zeros(2)}, None, "expected a name"),
    ({"a": np.zeros(2)}, {"step": 3}, r"metadata\['step'\]=3"),
  ],
)
def test_what_the_format_cannot_hold(tmp_path, tensors, metadata, match):
  with pytest.raises(ValueError, match=match):
    files.save_tensors(tmp_path / "x.safetensors", tensors, metadata)
  assert not list(tmp_path.iterdir())


# Refused by the library but for the last four, which it lets pass.
BAD = {
  "not JSON": (b'{"a":', b"", "invalid JSON"),
  "trailing bytes": ({"a": ONE}, FOUR + b"\0", "something was added"),
  "truncated": ({"a": ONE}, FOUR[:3], "truncated"),
  "overlap": ({"a": ONE, "b": ONE}, FOUR, "invalid offset"),
  "hole": ({"a": ONE | {"data_offsets": [4, 8]}}, 2 * FOUR, "invalid offset"),
  "negative": ({"a": ONE | {"shape": [-1]}}, FOUR, "invalid value"),
  "huge": ({"a": ONE | {"shape": [2**62, 4]}}, FOUR, "overflow"),
  "size": ({"a": ONE | {"shape": [2]}}, FOUR, "invalid shape"),
  "dtype": ({"a": ONE | {"dtype": "Q9"}}, FOUR, "unknown variant `Q9`"),
  "metadata": ({"__metadata__": {"step": 3}}, b"", "expected a string"),
  "a pickle": (None, b"\x80\x04\x95" + FOUR, "a pickle, which may run code"),
  "no file": (None, b"{}" * 9, "not a safetensors file"),
  "empty": (None, b"", "not a safetensors file"),
  "float8": ({"a": ONE | {"dtype": "F8_E5M2", "shape": [4]}}, FOUR, "F8_E5M2"),
  "rank": ({"a": ONE | {"shape": [1] * 99}}, FOUR, "dimension"),
  "twice": (b'{"a":%b,"a":%b}' % ((ONE_TEXT,) * 2), FOUR, "'a' occurs twice"),
  "metadata twice": (
    b'{"__metadata__":{"b":"1","b":"2"}}',
    b"",
    "'b' occurs twice",
  ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_refused_in_one_line(tmp_path, kind):
  header, data, match = BAD[kind]
  path = tmp_path / "model.safetensors"
  if header is None:
    path.write_bytes(data)
  else:
    file_of(tmp_path, header, data)
  with pytest.raises(ValueError) as caught:
    files.load_tensors(path)
  message = str(caught.value)
  assert message.startswith(f"{path}: ") and match in message
  assert "\n" not in message


@pytest.mark.parametrize(
  "name", ["a.pth", "model.safetensors", "a.BIN", "a.joblib"]
)
def test_pickles_are_refused_with_the_way_out(tmp_path, name):
  path = tmp_path / name
  path.write_bytes(b"PK\x03\x04" + b"\0" * 100)
  with pytest.raises(ValueError, match="pickle") as caught:
    files.load_tensors(path)
  message = str(caught.value)
  assert "torch.load(" in message and "save_file(" in message
  assert "\n" not in message


@pytest.mark.parametrize("length", [0x280, 0x480])
def test_headers_may_look_like_pickles(tmp_path, length):
  header = json.dumps({"a": ONE}).encode().ljust(length)
  path = file_of(tmp_path, header, FOUR)
  assert path.read_bytes()[:2] in (b"\x80\x02", b"\x80\x04")
  assert list(files.load_tensors(path)) == ["a"]


def test_other_things_than_files(tmp_path):
  with pytest.raises(FileNotFoundError, match="no such file"):
    files.load_tensors(tmp_path / "x.safetensors")
  with pytest.raises(ValueError, match="not a regular file"):
    files.load_tensors(tmp_path)
  files.save_tensors(tmp_path / "x.safetensors", {"a": np.zeros(2)})
  with pytest.raises(ValueError, match="no tensor 'b'"):
    files.load_tensors(tmp_path / "x.safetensors", ["a", "b"])
  found = files.load_tensors(tmp_path / "x.safetensors", ["a"])
  assert list(found) == ["a"]


def sharded(folder, rng):
  tensors = tensors_of(rng)
  return tensors, files.save_shards(folder, tensors, max_bytes=48)


def test_shards_and_their_index(tmp_path, rng):
  tensors, names = sharded(tmp_path, rng)
  assert len(names) > 2
  assert names[-1] == "model.safetensors.index.json"
  assert files.find_weights(tmp_path).name == names[-1]
  assert_same(files.load_tensors(files.find_weights(tmp_path)), tensors)
  index = json.loads((tmp_path / names[-1]).read_text())
  total = sum(value.nbytes for value in tensors.values())
  assert index["metadata"]["total_size"] == total


def test_small_models_are_one_file(tmp_path, rng):
  names = files.save_shards(tmp_path, tensors_of(rng))
  assert names == ["model.safetensors"]
  assert files.find_weights(tmp_path).name == names[0]
  (tmp_path / "model.safetensors.index.json").write_text("{}")
  with pytest.raises(ValueError, match="both"):
    files.find_weights(tmp_path)


def change_index(path, change):
  index = json.loads(path.read_text())
  change(index["weight_map"])
  path.write_text(json.dumps(index))


@pytest.mark.parametrize(
  "shard",
  [
    "../model.safetensors",
    "/etc/passwd",
    "sub/model.safetensors",
    "..",
    "a\\b.safetensors",
    "x.safetensors\n",
    "model.bin",
    ["model.safetensors"],
    7,
  ],
)
def test_an_index_names_plain_files_only(tmp_path, rng, shard):
  sharded(tmp_path, rng)
  index = tmp_path / "model.safetensors.index.json"
  change_index(index, lambda placed: placed.update(scalar=shard))
  with pytest.raises(ValueError, match="plain name"):
    files.load_tensors(index)


def test_an_index_that_disagrees(tmp_path, rng):
  _, names = sharded(tmp_path, rng)
  index = tmp_path / names[-1]
  whole = index.read_text()
  change_index(index, lambda placed: placed.pop("scalar"))
  with pytest.raises(ValueError, match=r"disagree about 1 tensors.*scalar"):
    files.load_tensors(index)
  index.write_text(whole)
  change_index(index, lambda placed: placed.update(more=names[0]))
  with pytest.raises(ValueError, match="'more'"):
    files.load_tensors(index)
  index.write_text('{"weight_map": []}')
  with pytest.raises(ValueError, match="weight_map"):
    files.load_tensors(index)
  index.write_text(whole)
  (tmp_path / names[0]).unlink()
  with pytest.raises(FileNotFoundError, match=names[0]):
    files.load_tensors(index)
