"""Wrong input is refused by name, and nothing is written."""

import json
import pickle
import zipfile

import numpy as np
import pytest

from gdn2_jax.interop import header
from gdn2_jax.interop.convert import fla, official
from gdn2_jax.interop.convert.options import Options
from gdn2_jax.interop.convert.run import convert, open_model
from gdn2_jax.interop.folder import save_model
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.mixers.attention import AttentionConfig
from gdn2_jax.model.mixers.gdn2 import GDN2Config
from tests.interop.convert import checkpoints
from tests.random_params import random_params

CHECKPOINTS = {"official": checkpoints.official, "fla": checkpoints.fla}


def refused(
  src, out, match, *, source="official", target="gdn2_jax", **options
):
  with pytest.raises((ValueError, FileNotFoundError)) as e:
    convert(src, out, source=source, target=target, options=Options(**options))
  assert match in str(e.value)
  assert "\n" not in str(e.value)


def drop(*names):
  return lambda tensors, config: [tensors.pop(name) for name in names]


def put(name, value):
  return lambda tensors, config: tensors.update({name: value})


def tell(**changes):
  return lambda tensors, config: config.update(changes)


def forget(*keys):
  return lambda tensors, config: [config.pop(key) for key in keys]


def in_attn(**changes):
  return lambda tensors, config: config["attn"].update(changes)


def reshape(name, *shape):
  def change(tensors, config):
    tensors[name] = tensors[name].reshape(shape)

  return change


def drop_layer(tensors, config):
  for name in [name for name in tensors if ".h.1." in name]:
    del tensors[name]


H0, H1 = "transformer.h.0.", "transformer.h.1."
L0 = "model.layers.0.attn."
ONE = np.zeros(1, np.float32)
CASES = [
  # Names and shapes.
  ("official", drop(H0 + "attn.b_proj.weight"), f"missing {H0}attn.b_proj"),
  ("official", drop(H0 + "attn.A_log"), f"missing {H0}attn.A_log"),
  ("official", drop(H1 + "norm_2.weight"), f"missing {H1}norm_2.weight"),
  ("official", drop("transformer.ln_f.weight"), "missing transformer.ln_f"),
  (
    "official",
    drop("lm_head.weight"),
    "lm_head.weight is missing. If the head",
  ),
  (
    "official",
    put("transformer.h.0.extra", ONE),
    "unexpected transformer.h",
  ),
  (
    "fla",
    put(L0 + "q_conv1d.bias", ONE),
    "unexpected model.layers.0.attn.q_c",
  ),
  (
    "official",
    drop_layer,
    "layers, of which 1 are missing, the first is " + H1,
  ),
  (
    "official",
    reshape(H0 + "norm_1.weight", 1, 64),
    "norm_1.weight [1, 64], ex",
  ),
  (
    "official",
    reshape(H0 + "attn.b_proj.weight", 128, 32),
    "b_proj.weight [128, 32], expected [64, 64]",
  ),
  (
    "official",
    put(H0 + "attn.q_conv1d.weight", np.zeros((64, 1, 3), np.float32)),
    "not the tensors that the config describes",
  ),
  (
    "official",
    put("transformer.ln_f.weight", np.zeros(64, np.int32)),
    "transformer.ln_f.weight is int32, expected float32",
  ),
  # Sizes.
  ("official", tell(n_layer=6), "n_layer=6, but the tensors have 4"),
  (
    "official",
    tell(vocab_size=60),
    "vocab_size=60, but the tensors have 128",
  ),
  ("official", tell(n_head=3), "n_head=3: expected a divisor of the width"),
  ("official", tell(n_head="2"), "n_head='2': expected a positive integer"),
  (
    "official",
    tell(n_query_groups=1),
    "n_query_groups=1, but the tensors have",
  ),
  ("official", tell(num_heads=4), "num_heads=4, but the tensors have 2"),
  ("official", tell(head_v_dim=16), "head_v_dim=16, but the tensors have 32"),
  ("official", tell(gdn2_per_layer=4), "makes the layers GSSS, the tensors"),
  ("official", forget("n_head"), "n_head is missing, and no tensor tells it"),
  ("official", forget("local_window"), "local_window is missing, and no tens"),
  ("fla", forget("norm_eps"), "norm_eps is missing, and no tensor tells it"),
  ("fla", tell(num_v_heads=3), "num_v_heads=3, but the tensors have 4"),
  ("fla", tell(expand_v=1.0), "expand_v=1.0: expected 24 / 16, by the tensors"),
  ("fla", in_attn(num_heads=5), "num_heads=5: expected a divisor of the width"),
  ("fla", in_attn(num_kv_heads=4), "k_proj.weight [16, 32], expected [32, 32]"),
  ("fla", in_attn(layers=[1]), "makes the layers GSGG, the tensors are those"),
  ("fla", in_attn(layers=[1, 4]), "expected layers below num_hidden_layers=4"),
  # What is computed.
  (
    "fla",
    tell(output_gate="silu"),
    "'sigmoid', which is what the dialect 'fla'",
  ),
  (
    "official",
    tell(output_gate="relu"),
    "output_gate='relu': expected None or 'silu' or",
  ),
  (
    "official",
    tell(rotary_percentage=0.5),
    "rotary_percentage=0.5: expected 1",
  ),
  ("official", tell(bias=True), "bias=True: expected False"),
  (
    "official",
    tell(soft_cap=30),
    "unknown keys soft_cap: they may change what",
  ),
  (
    "fla",
    tell(num_head=2),
    "num_head (did you mean num_heads?): they may change",
  ),
  ("fla", tell(tie_word_embeddings=True), "false, as there is lm_head.weight"),
  ("fla", tell(model_type="kda"), "model_type='kda': expected 'gdn2'"),
  ("fla", tell(norm_eps=-1.0), "norm_eps=-1.0: expected a positive number"),
  ("fla", in_attn(qkv_bias=True), "qkv_bias=True: expected False"),
  ("fla", tell(norm_eps=10**400), ": expected a positive number"),
  (
    "fla",
    tell(expand_v=1e200),
    "expand_v=1e+200: expected 24 / 16, by the ten",
  ),
]


@pytest.mark.parametrize(
  ("dialect", "change", "match"), CASES, ids=[case[2][:40] for case in CASES]
)
def test_wrong_tensors_and_configs(tmp_path, dialect, change, match):
  tensors, config = CHECKPOINTS[dialect]()
  change(tensors, config)
  src = checkpoints.write(tmp_path / "src", (tensors, config))
  refused(src, tmp_path / "out", match, source=dialect)
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  ("arguments", "match"),
  [
    ({"source": "fla"}, "names of the dialect 'official', not of 'fla'"),
    ({"source": "gdn2_jax"}, "no manifest.json: not a folder with a published"),
    ({"source": "hf"}, "model_type=None, expected 'gdn2_jax'"),
    (
      {"source": "pt"},
      "--from=pt: expected one of official, fla, hf, gdn2_jax",
    ),
    ({"target": "x"}, "--to=x: expected one of official, fla, hf, gdn2_jax"),
    ({"target": "fla"}, "compute 'sigmoid' and would load these weights with"),
    ({"output_gate": "sigmoid"}, "'sigmoid', as the options say"),
    ({"output_gate": "relu"}, "--output_gate=relu: expected one of silu, sig"),
    ({"preset": "gdn2_7B"}, "--preset=gdn2_7B: expected one of gdn2_1.3B, swa"),
    ({"preset": "gdn2_1.3B"}, "n_layer=18, but the tensors have 4"),
    ({"config": "none.json"}, "none.json: no such file"),
    ({"values": {"n_head": 5}}, "and --set: n_head=5: expected a divisor"),
    ({"dtype": "int8"}, "--dtype=int8: expected one of float32, bfloat16"),
    ({"step": 3}, "--step=3: goes with --from=gdn2_jax"),
    ({"from_conv_order": "up"}, "--from_conv_order=up: expected one of old"),
    ({"to_conv_order": "newest_first"}, "does not go with --to=gdn2_jax"),
    ({"untie_head": True}, "has a head of its own, lm_head.weight"),
  ],
)
def test_wrong_arguments(tmp_path, arguments, match):
  refused(checkpoints.OFFICIAL, tmp_path / "out", match, **arguments)
  assert not (tmp_path / "out").exists()


def test_pickles_with_the_way_to_convert_them(tmp_path):
  with zipfile.ZipFile(tmp_path / "model.pth", "w") as file:
    file.writestr("data.pkl", pickle.dumps({"model": 1}))
  for src in (tmp_path, tmp_path / "model.pth"):
    refused(src, tmp_path / "out", "save_file(")
    refused(src, tmp_path / "out", "model.pth: a pickle, which may run code")
  assert not (tmp_path / "out").exists()


def test_damaged_and_absent_files(tmp_path):
  out = tmp_path / "out"
  refused(tmp_path / "none", out, "none: no such file or folder")
  refused(tmp_path, out, "neither model.safetensors nor model.safetensors.i")
  src = checkpoints.write(tmp_path / "src", checkpoints.official())
  weights, config = src / "model.safetensors", src / "config.json"
  data = weights.read_bytes()
  weights.write_bytes(data[:-10])
  refused(src, out, "truncated, or something was added")
  weights.write_bytes(data)
  config.write_text("{")
  refused(src, out, "config.json: unreadable header or JSON")
  config.unlink()
  refused(src, out, "config.json (not there): n_head is missing")
  assert not out.exists()


def test_a_missing_shard(tmp_path):
  src = checkpoints.write(tmp_path / "src", checkpoints.official())
  convert(
    src,
    tmp_path / "shards",
    source="official",
    target="official",
    max_shard_bytes=200_000,
  )
  (tmp_path / "shards" / "model-00002-of-00006.safetensors").unlink()
  refused(
    tmp_path / "shards", tmp_path / "out", "00002-of-00006.safetensors: n"
  )
  assert not (tmp_path / "out").exists()


def test_a_folder_to_write_that_is_not_free(tmp_path):
  src = checkpoints.write(tmp_path / "src", checkpoints.official())
  before = sorted(p.name for p in src.iterdir())
  refused(src, src, "src: the folder of --src=")
  refused(src / "model.safetensors", src, "src: the folder of --src=")
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "mine").write_text("mine")
  refused(
    src, tmp_path / "full", "full: not empty, and not a folder with a model"
  )
  (tmp_path / "file").write_text("mine")
  refused(src, tmp_path / "file", "file: a file, expected a folder")
  assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine"]
  assert sorted(p.name for p in src.iterdir()) == before


def model_config(**changes):
  fields = {
    "vocab_size": 61,
    "model_dim": 32,
    "num_layers": 2,
    "pattern": "GS",
    "mlp_dim": 48,
    "gdn2": GDN2Config(
      num_heads=2, key_dim=16, value_dim=16, write_gate="scalar"
    ),
    "attention": AttentionConfig(num_heads=2, head_dim=16, window=7),
  }
  return ModelConfig(**(fields | changes))


@pytest.mark.parametrize(
  ("write_config", "changes", "match"),
  [
    (
      official.write_config,
      {"pattern": "SG"},
      "layers SG: in the official pro",
    ),
    (
      official.write_config,
      {"attention": AttentionConfig(num_heads=2, head_dim=8)},
      "attention.num_heads=2 of head_dim=8: the official program",
    ),
    (
      official.write_config,
      {"attention": AttentionConfig(num_heads=2, head_dim=16, rope_base=9.0)},
      "attention.rope_base=9.0",
    ),
    (
      official.write_config,
      {"gdn2": GDN2Config(norm_eps=1e-6)},
      "gdn2.norm_eps=1e-06: the output norm of the official",
    ),
    (
      fla.write_config,
      {"norm_eps": 1e-6},
      "norm_eps=1e-06: fla has one for all norms, the output norm has gdn2",
    ),
    (
      fla.write_config,
      {"attention": AttentionConfig(num_heads=2, head_dim=8)},
      "attention.num_heads=2 of head_dim=8: fla has",
    ),
  ],
)
def test_what_others_cannot_express(write_config, changes, match):
  with pytest.raises(ValueError, match=match):
    write_config(model_config(**changes))


def test_models_of_ours_that_stay_here(tmp_path):
  src, out, config = tmp_path / "ours", tmp_path / "out", model_config()
  save_model(src, random_params(config), config)
  ours = {"source": "gdn2_jax", "target": "official"}
  refused(src, out, "write_gate='scalar': expected 'channel'", **ours)
  refused(src, out, "the model in", output_gate="sigmoid", **ours)
  refused(src, out, "--set: does not go", values={"n_head": 1}, **ours)
  refused(src, out, "ours is not a workdir", step=3, **ours)
  ours["target"] = "fla"
  refused(src, out, "output_gate='silu': programs of the dialect 'fla'", **ours)
  weights = src / "model.safetensors"
  weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
  refused(src, out, "damaged or altered", **ours)
  assert not out.exists()


def test_facts_that_the_user_states(tmp_path):
  tensors, config = checkpoints.official()
  window, heads = config.pop("local_window"), config.pop("n_head")
  src = checkpoints.write(tmp_path / "src", (tensors, config | {"cap": None}))
  stated = Options(
    values={"local_window": window, "n_head": heads}, ignored=("cap",)
  )
  found = open_model(src, "official", stated).config
  assert found == open_model(checkpoints.OFFICIAL, "official", Options()).config
  (src / "config.json").rename(tmp_path / "else.json")
  del config["n_embd"], config["head_dim"], config["vocab_size"]
  text = json.dumps(config | {"local_window": window, "n_head": heads})
  (tmp_path / "less.json").write_text(text)
  stated = Options(config=str(tmp_path / "less.json"))
  assert found == open_model(src, "official", stated).config


def test_a_prefix_of_all_names(tmp_path):
  tensors, config = checkpoints.official()
  tensors = {"_orig_mod." + name: value for name, value in tensors.items()}
  src = checkpoints.write(tmp_path / "src", (tensors, config))
  refused(src, tmp_path / "out", "pass --strip_prefix=_orig_mod.")
  refused(src, tmp_path / "out", "expected --strip_prefix=x", strip_prefix="x")
  stated = Options(strip_prefix="_orig_mod.")
  found = open_model(src, "official", stated).tensors
  same = open_model(checkpoints.OFFICIAL, "official", Options()).tensors
  assert found.keys() == same.keys()


@pytest.mark.parametrize("target", ["official", "gdn2_jax"])
def test_a_failed_write_leaves_nothing(tmp_path, target):
  src = checkpoints.write(tmp_path / "src", checkpoints.official())
  read, tensors = header._read, []

  def fail(path, name):
    tensors.append(name)
    if len(tensors) == 9:
      raise OSError("No space left on device")
    return read(path, name)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(header, "_read", fail)
    with pytest.raises(OSError, match="No space"):
      convert(src, tmp_path / "out", source="official", target=target)
  assert not (tmp_path / "out").exists()
  convert(src, tmp_path / "out", source="official", target=target)
