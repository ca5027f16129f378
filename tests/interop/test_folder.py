"""Published models: written whole, read whole, or refused."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from gdn2_jax.data.tokenizer.api import BytesTokenizer
from gdn2_jax.files import sha256_file
from gdn2_jax.interop import Card, load_model, save_model
from gdn2_jax.interop import folder as folder_lib
from gdn2_jax.sharding import MeshConfig, make_mesh
from tests.model.models import small_config
from tests.random_params import random_params

CONFIG = small_config("GS", num_layers=2, vocab_size=260)


@pytest.fixture(scope="module")
def params():
  return random_params(CONFIG)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, params):
  folder = tmp_path_factory.mktemp("models") / "tiny"
  card = Card(
    license="mit", description="A test.", tags=("x",), facts={"steps|": "3\n4"}
  )
  save_model(folder, params, CONFIG, BytesTokenizer(), card=card)
  return folder


@pytest.fixture
def copy(saved, tmp_path):
  """A folder to damage."""
  for path in saved.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  return tmp_path


def assert_same(tree, expected):
  assert jax.tree.structure(tree) == jax.tree.structure(expected)
  leaves = (jax.tree.leaves(tree), jax.tree.leaves(expected))
  for a, b in zip(*leaves, strict=True):
    assert isinstance(a, jax.Array) and a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def names_in(folder):
  return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_comes_back(saved, params):
  model = load_model(saved)
  assert model.config == CONFIG
  assert_same(model.params, params)
  assert model.tokenizer.sha256 == BytesTokenizer().sha256
  assert names_in(saved) == [
    "README.md",
    "config.json",
    "manifest.json",
    "model.safetensors",
    "tokenizer.json",
  ]


def test_the_card(saved):
  text = (saved / "README.md").read_text()
  assert text.startswith('---\nlicense: "mit"\nlibrary_name: gdn2_jax\n')
  assert '- "x"\n---\n\n# tiny\n\nA test.\n' in text
  total = sum(leaf.size for leaf in jax.tree.leaves(random_params(CONFIG)))
  assert f"| parameters | {total:,} |" in text
  assert "| steps\\| | 3 4 |" in text
  assert "load_model" in text and "run.py" not in text


def test_shards_and_other_trees(tmp_path, params):
  config = dataclasses.replace(CONFIG, scan_layers=False)
  model = small_config("GS", num_layers=2, vocab_size=260, scan_layers=True)
  save_model(tmp_path, params, model, max_shard_bytes=20_000)
  assert len([n for n in names_in(tmp_path) if "-of-" in n]) > 1
  found = load_model(tmp_path)
  assert found.tokenizer is None
  assert_same(found.params, params)
  save_model(tmp_path, found.params, model, overwrite=True)
  assert "model.safetensors" in names_in(tmp_path)
  assert not [n for n in names_in(tmp_path) if "-of-" in n or "index" in n]
  # The same weights in a tree of the other kind.
  tree = json.loads((tmp_path / "config.json").read_text())
  tree["model"]["scan_layers"] = False
  reseal(tmp_path, "config.json", json.dumps(tree).encode())
  unrolled = load_model(tmp_path)
  assert unrolled.config == config
  assert set(unrolled.params) == {"embedding", "group_0", "final_norm", "head"}


def test_parameters_can_be_sharded(saved, params):
  mesh = make_mesh(MeshConfig(fsdp=4), jax.devices()[:4])
  model = load_model(saved, mesh=mesh)
  table = model.params["embedding"]["table"]
  assert len(table.sharding.device_set) == 4
  assert_same(model.params, params)


def reseal(folder, name, data):
  """Changes a file together with its line in the manifest."""
  (folder / name).write_bytes(data)
  tree = json.loads((folder / "manifest.json").read_text())
  tree["files"][name] = {
    "bytes": len(data),
    "sha256": sha256_file(folder / name),
  }
  (folder / "manifest.json").write_text(json.dumps(tree))


FILES = ("config.json", "model.safetensors", "tokenizer.json")


@pytest.mark.parametrize("name", FILES)
def test_one_bit_is_enough(copy, name):
  data = bytearray((copy / name).read_bytes())
  data[-3] ^= 1
  (copy / name).write_bytes(data)
  with pytest.raises(ValueError, match=f"{name}: damaged or altered"):
    load_model(copy)


@pytest.mark.parametrize("name", FILES)
def test_missing_and_truncated_files(copy, name):
  data = (copy / name).read_bytes()
  (copy / name).write_bytes(data[:-1])
  with pytest.raises(ValueError, match=f"{name}: .* bytes, manifest"):
    load_model(copy)
  (copy / name).unlink()
  with pytest.raises(ValueError, match=f"{name}: missing"):
    load_model(copy)


def change(field, value):
  def apply(folder):
    tree = json.loads((folder / "config.json").read_text())
    owner = tree["model"] if field.startswith("model.") else tree
    owner[field.removeprefix("model.")] = value
    reseal(folder, "config.json", json.dumps(tree).encode())

  return apply


def change_manifest(**fields):
  def apply(folder):
    tree = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(tree | fields))

  return apply


def other_weights(folder):
  (folder / "model.safetensors.index.json").write_text("{}")


DAMAGE = {
  "format": (change("format", "torch"), "format='torch'"),
  "version": (change("format_version", 2), "format_version=2"),
  "version true": (change("format_version", True), "format_version=True"),
  "unknown field": (change("author", "me"), "author: unknown field"),
  "unknown key": (change("model.heads", 3), "model.heads: unknown field"),
  "type": (change("model.mlp_dim", "48"), "model.mlp_dim='48'"),
  "value": (change("model.pattern", "GX"), "model.pattern='GX'"),
  "shape": (change("model.mlp_dim", 64), "mlp.gate.kernel: float32"),
  "huge": (change("model.num_layers", 10**12), "num_layers=1000000000000"),
  "sizes": (change("model.vocab_size", 2**40), "sizes that no array can have"),
  "layers": (change("model.num_layers", 4), r"missing layers\.2"),
  "vocabulary": (change("model.vocab_size", 100), "table"),
  "not JSON": (
    lambda f: reseal(f, "config.json", b"{"),
    "config.json: unreadable",
  ),
  "no model": (
    lambda f: reseal(f, "config.json", b'{"format": "gdn2_jax"}'),
    "format_version=None",
  ),
  "no manifest": (lambda f: (f / "manifest.json").unlink(), "interrupted"),
  "no config": (change_manifest(files={}), "config.json is not listed"),
  "list": (change_manifest(files=[]), "expected an object"),
  "outside": (
    change_manifest(files={"../x": {"bytes": 1, "sha256": "0" * 64}}),
    "../x",
  ),
  "hash": (
    change_manifest(files={"x": {"bytes": 1, "sha256": 0}}),
    "'x'",
  ),
  "more than a hash": (
    change_manifest(files={"x": {"bytes": 1, "sha256": "0" * 64, "mode": 7}}),
    "'mode': 7}: expected a plain file name, with bytes and sha256",
  ),
  "added weights": (other_weights, "not in manifest"),
  "tokenizer": (
    lambda f: reseal(f, "tokenizer.json", b"{}"),
    "tokenizer.json",
  ),
  "pickle": (
    lambda f: reseal(f, "model.safetensors", b"PK\x03\x04" + b"\0" * 9),
    "pickle",
  ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_altered_folders_are_refused(copy, kind):
  damage, match = DAMAGE[kind]
  damage(copy)
  with pytest.raises(ValueError, match=match):
    load_model(copy)


def test_what_is_no_folder(tmp_path, saved):
  with pytest.raises(FileNotFoundError, match="no such folder"):
    load_model(tmp_path / "x")
  with pytest.raises(FileNotFoundError, match="no such folder"):
    load_model(saved / "config.json")
  with pytest.raises(ValueError, match="no manifest"):
    load_model(tmp_path)


def test_files_of_others_are_left_alone(copy, params):
  (copy / ".gitattributes").write_text("lfs")
  (copy / "README.md").write_text("# mine")
  load_model(copy)
  save_model(copy, params, CONFIG, overwrite=True)
  assert ".gitattributes" in names_in(copy)
  assert "tokenizer.json" not in names_in(copy)
  assert load_model(copy).tokenizer is None


def test_nothing_is_overwritten_by_accident(copy, params, tmp_path_factory):
  before = (copy / "model.safetensors").read_bytes()
  with pytest.raises(ValueError, match="overwrite=True"):
    save_model(copy, params, CONFIG)
  other = tmp_path_factory.mktemp("other")
  (other / "thesis.tex").write_text("x")
  with pytest.raises(ValueError, match="not empty"):
    save_model(other, params, CONFIG, overwrite=True)
  with pytest.raises(ValueError, match="expected a folder"):
    save_model(other / "thesis.tex", params, CONFIG, overwrite=True)
  wide = dataclasses.replace(CONFIG, mlp_dim=64)
  with pytest.raises(ValueError, match="not those of this model"):
    save_model(copy, params, wide, overwrite=True)
  many = types.SimpleNamespace(vocab_size=261)
  with pytest.raises(ValueError, match="261 ids"):
    save_model(copy, params, CONFIG, many, overwrite=True)
  with pytest.raises(ValueError, match="a plain file name that the folder"):
    save_model(copy, params, CONFIG, extra={"../x": b""}, overwrite=True)
  assert (copy / "model.safetensors").read_bytes() == before
  assert names_in(other) == ["thesis.tex"]


def test_a_failed_save_leaves_the_old_model(copy, params, monkeypatch):
  before = {path.name: path.read_bytes() for path in copy.iterdir()}

  def full(*args, **kwargs):
    raise OSError("no space left on device")

  monkeypatch.setattr(folder_lib, "render_card", full)
  with pytest.raises(OSError, match="no space"):
    save_model(copy, params, CONFIG, overwrite=True)
  after = {path.name: path.read_bytes() for path in copy.iterdir()}
  assert after == before


def test_an_interrupted_move_can_be_repeated(copy, params, monkeypatch):
  real, moved = folder_lib.os.replace, []

  def killed(source, target):
    # Only the moves into the folder, not the writing before.
    if folder_lib._STAGING in str(source) and target.parent == copy:
      moved.append(target)
      if len(moved) == 2:
        raise KeyboardInterrupt
    real(source, target)

  monkeypatch.setattr(folder_lib.os, "replace", killed)
  with pytest.raises(KeyboardInterrupt):
    save_model(copy, params, CONFIG, overwrite=True)
  monkeypatch.undo()
  with pytest.raises(ValueError, match="interrupted"):
    load_model(copy)
  save_model(copy, params, CONFIG, overwrite=True)
  assert load_model(copy).config == CONFIG
