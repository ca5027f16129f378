"""Folders for transformers: files, names, the way back, refusals; no torch."""

import ast
import dataclasses
import json
import pathlib

import numpy as np
import pytest

import gdn2_jax.interop.hf
from gdn2_jax.data.tokenizer.api import (
  BytesTokenizer,
  load_tokenizer,
  train_bpe,
)
from gdn2_jax.interop import load_model, save_model
from gdn2_jax.interop.convert import Options, convert
from gdn2_jax.interop.header import read_header
from gdn2_jax.interop.hf import moves
from gdn2_jax.interop.tree import float32_names
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.mixers import registry
from gdn2_jax.model.mixers.gdn2_config import GDN2Config
from tests.interop.convert import checkpoints
from tests.model.models import small_config
from tests.random_params import random_params

pytestmark = pytest.mark.slow

REMOTE = pathlib.Path(gdn2_jax.interop.hf.__file__).parent / "remote"
KINDS = "GMNS"  # one of each kind of layer


def exported(folder, config, tokenizer=None, **options):
  """The folder of ours, and that for transformers."""
  ours, theirs = folder / "ours", folder / "theirs"
  save_model(ours, random_params(config), config, tokenizer)
  convert(
    ours, theirs, source="gdn2_jax", target="hf", options=Options(**options)
  )
  return ours, theirs


CONFIG = small_config(
  KINDS, num_layers=4, vocab_size=260, loss_chunk=ModelConfig().loss_chunk
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  return exported(tmp_path_factory.mktemp("hf"), CONFIG, BytesTokenizer())


def test_there_and_back_gives_the_same_bits(folders, tmp_path):
  ours, theirs = folders
  back = tmp_path / "back"
  convert(theirs, back, source="hf", target="gdn2_jax")
  checkpoints.assert_same(checkpoints.read(back), checkpoints.read(ours))
  # How a model is executed is no part of it.
  plain = {
    name: dataclasses.replace(getattr(CONFIG, name), implementation="")
    for name in ("gdn2", "mamba2", "mamba3", "attention")
  }
  model = load_model(back)
  assert model.config == dataclasses.replace(CONFIG, **plain)
  assert model.tokenizer.eos_id == 256


def test_linear_maps_have_the_axes_of_torch(folders):
  ours, theirs = folders
  tensors = read_header(theirs / "model.safetensors")
  assert tensors.metadata == {"format": "pt"}
  shapes = {name: x.shape for name, x in tensors.tensors.items()}
  assert shapes["model.embedding.weight"] == (260, 32)
  assert shapes["lm_head.weight"] == (260, 32)
  layer = "model.layers.0.mixer."
  assert shapes[f"{layer}v_proj.weight"] == (4 * 24, 32)
  assert shapes[f"{layer}o_proj.weight"] == (32, 4 * 24)
  assert shapes[f"{layer}q_conv.weight"] == (32, 1, 4)
  assert shapes[f"{layer}g_up.bias"] == (4 * 24,)
  found = checkpoints.read(theirs)[f"{layer}q_proj.weight"]
  kernel = checkpoints.read(ours)["layers.0.mixer.q_proj.kernel"]
  np.testing.assert_array_equal(found, kernel.reshape(32, -1).T)


def test_a_rounded_model_keeps_its_decays(folders, tmp_path):
  theirs = tmp_path / "theirs"
  half = Options(dtype="bfloat16")
  convert(folders[0], theirs, source="gdn2_jax", target="hf", options=half)
  written = read_header(theirs / "model.safetensors").tensors
  kept = float32_names(CONFIG)
  assert {name.split(".")[-1] for name in kept} == {
    *("A_log", "dt_bias", "D", "B_bias", "C_bias"),
    *("mimo_x", "mimo_z", "mimo_o"),
  }
  for move in moves(CONFIG):
    dtype = "float32" if move.ours[0] in kept else "bfloat16"
    assert str(written[move.theirs].dtype) == dtype, move.theirs
  assert json.loads((theirs / "config.json").read_text())["dtype"] == "bfloat16"
  convert(theirs, tmp_path / "back", source="hf", target="gdn2_jax")
  back = read_header(tmp_path / "back/model.safetensors").tensors
  assert str(back["layers.1.mixer.D"].dtype) == "float32"
  assert str(back["layers.1.mixer.z_proj.kernel"].dtype) == "bfloat16"


def test_shards_have_an_index(folders, tmp_path):
  ours, _ = folders
  out = tmp_path / "sharded"
  convert(ours, out, source="gdn2_jax", target="hf", max_shard_bytes=100_000)
  index = json.loads((out / "model.safetensors.index.json").read_text())
  assert len(set(index["weight_map"].values())) > 1
  convert(out, tmp_path / "back", source="hf", target="gdn2_jax")
  checkpoints.assert_same(
    checkpoints.read(tmp_path / "back"), checkpoints.read(ours)
  )


def test_files_of_the_folder(folders):
  _, theirs = folders
  names = {path.name for path in theirs.iterdir()}
  code = {path.name for path in REMOTE.glob("*.py")} - {"__init__.py"}
  assert names == code | {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
  }
  config = json.loads((theirs / "config.json").read_text())
  assert config["model_type"] == "gdn2_jax"
  for entry in config["auto_map"].values():
    module, _, name = entry.partition(".")
    assert f"class {name}(" in (theirs / f"{module}.py").read_text()
  card = (theirs / "README.md").read_text()
  assert "library_name: transformers" in card
  assert "AutoModelForCausalLM.from_pretrained(folder, trust_remote" in card
  assert "manifest" not in card


def test_the_code_needs_torch_and_transformers_only():
  for path in REMOTE.glob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      found = []
      if isinstance(node, ast.Import):
        found = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom) and not node.level:
        found = [node.module]
      for module in found:
        root = module.split(".")[0]
        allowed = ("math", "types", "torch", "transformers", "fla")
        assert root in allowed, f"{path.name}: {module}"


TEXTS = ["Hello, w\u00f6rld 123", "<|eos|> is text", " a  b\n", "", "\u20ac"]


def test_tokenizers_keep_their_ids(folders, tmp_path):
  _, theirs = folders
  found = load_tokenizer(theirs / "tokenizer.json")
  for text in TEXTS:
    assert found.encode(text) == BytesTokenizer().encode(text)
    assert found.decode(found.encode(text)) == text
  assert json.loads((theirs / "generation_config.json").read_text()) == {
    "eos_token_id": 256,
    "pad_token_id": 258,
  }
  bpe = train_bpe(["the cat sat on the mat " * 9], 300)
  content = json.loads(bpe.to_json())
  # As in files of Llama: a token before each text, which ours never have.
  content["post_processor"] = {
    "type": "TemplateProcessing",
    "single": [
      {"SpecialToken": {"id": "<|eos|>", "type_id": 0}},
      {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
    "special_tokens": {
      "<|eos|>": {
        "id": "<|eos|>",
        "ids": [bpe.eos_id],
        "tokens": ["<|eos|>"],
      }
    },
  }
  (tmp_path / "llama.json").write_text(json.dumps(content))
  bpe = load_tokenizer(tmp_path / "llama.json")
  _, theirs = exported(tmp_path, small_config("S", vocab_size=300), bpe)
  written = json.loads((theirs / "tokenizer.json").read_text())
  assert written["post_processor"] is None
  settings = json.loads((theirs / "tokenizer_config.json").read_text())
  assert settings["pad_token"] == settings["eos_token"] == "<|eos|>"


def test_foreign_mixers_are_refused(tmp_path, monkeypatch):
  monkeypatch.setitem(registry._KINDS, "x", registry.kind_of("S"))
  with pytest.raises(ValueError, match=r"no mixer 'x'.*among G.*, A"):
    exported(tmp_path, small_config("Sx"))
  assert not (tmp_path / "theirs").exists()


@pytest.mark.parametrize(
  "change, message",
  [
    ({"model_type": "llama"}, "model_type='llama', expected 'gdn2_jax'"),
    ({"pattern": "Gx"}, "pattern='Gx': expected letters among G, K"),
    ({"norm_eps": None}, "norm_eps: missing field"),
    ({"gdn2": {"heads": 2}}, "heads"),
    ({"mlp_dim": "48"}, "mlp_dim='48': expected int, got str"),
    ({"mlp_dim": 40}, "not the tensors that the config describes"),
    ({"num_layers": 3}, "num_layers=3: expected a positive multiple"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
  ],
)
def test_a_wrong_config_is_refused(folders, tmp_path, change, message):
  _, theirs = folders
  for name in ("model.safetensors", "config.json"):
    (tmp_path / name).write_bytes((theirs / name).read_bytes())
  config = json.loads((tmp_path / "config.json").read_text()) | change
  config = {key: x for key, x in config.items() if x is not None}
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match=message) as error:
    convert(tmp_path, tmp_path / "out", source="hf", target="gdn2_jax")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "options, message",
  [
    ({"strip_prefix": "x."}, "--strip_prefix: does not go with --from=hf"),
    ({"untie_head": True}, "--untie_head: does not go with --from=hf"),
    ({"step": 3}, "--step=3: goes with --from=gdn2_jax"),
    ({"output_gate": "sigmoid"}, "has 'silu'"),
  ],
)
def test_options_that_do_nothing_are_refused(
  folders, tmp_path, options, message
):
  with pytest.raises(ValueError, match=message):
    convert(
      folders[1],
      tmp_path / "out",
      source="hf",
      target="gdn2_jax",
      options=Options(**options),
    )


def test_other_programs_models_come_too(tmp_path):
  src = checkpoints.write(tmp_path / "src", checkpoints.fla())
  convert(src, tmp_path / "a", source="fla", target="hf")
  convert(tmp_path / "a", tmp_path / "b", source="hf", target="fla")
  checkpoints.assert_same(
    checkpoints.read(tmp_path / "b"), checkpoints.fla()[0]
  )


def test_ablations_have_a_config(tmp_path):
  gdn2 = GDN2Config(
    num_heads=1, key_dim=16, value_dim=16, erase_gate="head", decay="scalar"
  )
  _, theirs = exported(tmp_path, small_config("G", gdn2=gdn2))
  written = json.loads((theirs / "config.json").read_text())["gdn2"]
  assert (written["erase_gate"], written["decay"]) == ("head", "scalar")
  assert "implementation" not in written
