"""Published folders through a stand-in of the Hugging Face Hub."""

import pickle

import jax
import numpy as np
import pytest

from gdn2_jax import load_model, save_model
from gdn2_jax.interop import hub
from gdn2_jax.interop.tree import param_specs, unflatten_params
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.mixers.gdn2 import GDN2Config
from tests import hub_server

CONFIG = ModelConfig(
  vocab_size=64,
  model_dim=16,
  num_layers=1,
  gdn2=GDN2Config(num_heads=1, key_dim=16, value_dim=16),
  mlp_dim=32,
  dtype="float32",
)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
  rng = np.random.default_rng(0)
  tensors = {
    name: rng.normal(0, 0.5, spec.shape).astype(spec.dtype)
    for name, spec in param_specs(CONFIG).items()
  }
  folder = tmp_path_factory.mktemp("hub") / "tiny"
  save_model(folder, unflatten_params(tensors, CONFIG), CONFIG)
  return folder


@pytest.fixture
def server(monkeypatch, tmp_path):
  """An empty Hub, and a client with an empty cache."""
  from huggingface_hub import constants

  monkeypatch.setenv("NO_PROXY", "*")
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
  monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
  with hub_server.serve() as running:
    monkeypatch.setenv("HF_ENDPOINT", running.url)
    yield running


def test_a_pushed_model_is_loaded_with_the_same_bits(published, server):
  name = hub.push(published, "user/tiny")
  assert name == f"hf:user/tiny@{hub_server.COMMIT}"
  assert server.created[0]["name"] == "tiny"
  assert "private" in str(server.created[0])
  here = {path.name for path in published.iterdir()}
  assert set(server.files) == here
  loaded, known = load_model(name), load_model(published)
  assert loaded.config == known.config
  jax.tree.map(np.testing.assert_array_equal, loaded.params, known.params)
  # A second time from the cache: nothing is sent.
  sent = server.served
  load_model("hf:user/tiny", revision=hub_server.COMMIT)
  assert server.served == sent


def test_only_files_of_a_published_folder_are_fetched(published, server):
  hub.push(published, "user/tiny")
  server.files["pytorch_model.bin"] = pickle.dumps(0)
  server.files["run.py"] = b"raise SystemExit(1)"
  folder = hub.fetch("hf:user/tiny@main")
  assert {path.name for path in folder.iterdir()} == {
    path.name for path in published.iterdir()
  }


def test_a_damaged_file_is_refused(published, server):
  hub.push(published, "user/tiny")
  data = bytearray(server.files["model.safetensors"])
  data[-1] ^= 1
  server.files["model.safetensors"] = bytes(data)
  with pytest.raises(ValueError, match=r"model.safetensors: damaged"):
    load_model("hf:user/tiny@main")


def test_the_revision_is_required_and_the_newest_is_named(published, server):
  hub.push(published, "user/tiny")
  with pytest.raises(ValueError, match=f"newest commit is {'c' * 40}"):
    load_model("hf:user/tiny")


@pytest.mark.parametrize(
  ("name", "revision", "message"),
  [
    ("hf:tiny", "main", "'hf:tiny': expected hf:USER/NAME"),
    ("hf:a/b/c", "main", "expected hf:USER/NAME"),
    ("hf:user/tiny@v1", "v2", "revision='v2': 'hf:user/tiny@v1' names another"),
    ("models/tiny", "v1", "revision='v1': only hf: names have revisions"),
  ],
)
def test_malformed_names(name, revision, message):
  with pytest.raises(ValueError, match=message):
    load_model(name, revision=revision)


def test_without_network_the_error_is_one_line(monkeypatch, tmp_path):
  from huggingface_hub import constants

  monkeypatch.setenv("NO_PROXY", "*")
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
  monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
  with pytest.raises(ConnectionError, match="hf:user/tiny@v1: the Hub") as e:
    load_model("hf:user/tiny@v1")
  assert "\n" not in str(e.value)


def test_without_the_package_the_error_names_the_extra(monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
  with pytest.raises(ConnectionError, match=r"pip install 'gdn2-jax\[hub\]'"):
    load_model("hf:user/tiny@v1")
