"""There, back and across, bit for bit; nothing is left over or made up."""

import dataclasses
import json
import pathlib
import tarfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from gdn2_jax.data.tokenizer.api import BytesTokenizer, train_bpe
from gdn2_jax.interop.convert.official import PRESETS
from gdn2_jax.interop.convert.options import Options
from gdn2_jax.interop.convert.run import convert, open_model
from gdn2_jax.interop.folder import load_model, save_model
from gdn2_jax.interop.tree import flatten_params
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.mixers.gdn2 import GDN2Config
from tests.interop.convert import checkpoints
from tests.random_params import random_params

pytestmark = pytest.mark.slow

GOLDEN = pathlib.Path(__file__).parents[2] / "train/checkpoint/golden"
WORKDIR = GOLDEN / "0.1.0.tar.xz"

CHECKPOINTS = {"official": checkpoints.official, "fla": checkpoints.fla}
GATES = {"official": "silu", "fla": "sigmoid"}


def run(src, out, source, target, **options):
  return convert(
    src, out, source=source, target=target, options=Options(**options)
  )


@pytest.fixture(scope="module", params=["official", "fla"])
def dialect(request):
  return request.param


@pytest.fixture(scope="module")
def theirs(dialect, tmp_path_factory):
  """A folder of the dialect."""
  folder = tmp_path_factory.mktemp(dialect)
  return checkpoints.write(folder, CHECKPOINTS[dialect]())


@pytest.fixture(scope="module")
def ours(theirs, dialect, tmp_path_factory):
  """The same model in our format."""
  out = tmp_path_factory.mktemp("ours") / "model"
  run(theirs, out, dialect, "gdn2_jax")
  return out


def test_there_and_back_gives_the_same_bits(theirs, ours, dialect, tmp_path):
  tensors, config = CHECKPOINTS[dialect]()
  run(ours, tmp_path / "back", "gdn2_jax", dialect)
  checkpoints.assert_same(checkpoints.read(tmp_path / "back"), tensors)
  written = json.loads((tmp_path / "back" / "config.json").read_text())
  for key in set(written) & set(config) - {"torch_dtype"}:
    assert written[key] == config[key], key


def test_across_and_back_gives_the_same_bits(theirs, ours, dialect, tmp_path):
  (other,) = set(CHECKPOINTS) - {dialect}
  gate = GATES[dialect]
  if dialect == "fla":  # what the official program has one value for
    tensors, config = checkpoints.fla()
    config["attn"]["rope_theta"] = 10000.0
    config["norm_eps"] = 1e-5
    theirs = checkpoints.write(tmp_path / "plain", (tensors, config))
  run(theirs, tmp_path / "a", dialect, other, output_gate=gate)
  run(tmp_path / "a", tmp_path / "b", other, dialect, output_gate=gate)
  checkpoints.assert_same(
    checkpoints.read(tmp_path / "b"), checkpoints.read(theirs)
  )
  run(tmp_path / "a", tmp_path / "c", other, "gdn2_jax", output_gate=gate)
  checkpoints.assert_same(
    checkpoints.read(tmp_path / "c"), checkpoints.read(ours)
  )


def test_float32_leaves_stay_float32(ours, dialect):
  found = load_model(ours)
  assert found.config.gdn2.output_gate == GATES[dialect]
  dtype = {"official": "float32", "fla": "bfloat16"}[dialect]
  assert found.config.param_dtype == dtype
  for name, value in flatten_params(found.params, found.config).items():
    kept = name.endswith(("A_log", "dt_bias"))
    assert str(value.dtype) == ("float32" if kept else dtype), name


def test_sizes_of_fla_are_read(tmp_path):
  src = checkpoints.write(tmp_path, checkpoints.fla())
  config = open_model(src, "fla", Options()).config
  assert (config.pattern, config.num_layers) == ("GS", 4)
  assert (config.gdn2.num_heads, config.gdn2.value_heads) == (2, 4)
  assert (config.gdn2.key_dim, config.gdn2.value_dim) == (16, 24)
  assert config.gdn2.negative_eigenvalues
  a = config.attention
  assert (a.num_heads, a.kv_heads, a.head_dim, a.window) == (4, 2, 8, 7)
  assert a.rope_base == 5000.0


def test_keys_of_fla_that_are_not_read_are_listed(tmp_path):
  tensors, config = checkpoints.fla()
  config |= {"use_cache": True, "soft_cap": 30, "hidden_ratio": 4}
  src = checkpoints.write(tmp_path, (tensors, config))
  assert open_model(src, "fla", Options(ignored=("soft_cap",))).notes == [
    "keys of the config that were not read: architectures, attn_mode, "
    "torch_dtype, transformers_version, use_cache"
  ]


def test_full_attention_is_read_and_written(tmp_path):
  tensors, config = checkpoints.fla()
  spec = config["attn"] | {"layers": [3], "window_size": None}
  config["attn"] = [config["attn"] | {"layers": [1]}, spec]
  src = checkpoints.write(tmp_path / "src", (tensors, config))
  run(src, tmp_path / "ours", "fla", "gdn2_jax")
  assert load_model(tmp_path / "ours").config.pattern == "GSGA"
  run(tmp_path / "ours", tmp_path / "back", "gdn2_jax", "fla")
  written = json.loads((tmp_path / "back" / "config.json").read_text())
  assert written["attn"] == config["attn"]


@pytest.mark.parametrize("window", [-1, None])
def test_no_window_is_full_attention(tmp_path, window):
  tensors, config = checkpoints.official()
  src = checkpoints.write(
    tmp_path / "src", (tensors, config | {"local_window": window})
  )
  assert open_model(src, "official", Options()).config.pattern == "GA"
  run(src, tmp_path / "back", "official", "official")
  written = json.loads((tmp_path / "back" / "config.json").read_text())
  assert written["local_window"] == -1
  checkpoints.assert_same(checkpoints.read(tmp_path / "back"), tensors)


@pytest.mark.parametrize("order", ["oldest_first", "newest_first"])
@pytest.mark.parametrize(
  "stored",
  [
    lambda a: a,  # [C, 1, W]
    lambda a: a[:, 0],  # [C, W]
    lambda a: a[:, 0].T,  # [W, C]
    lambda a: a.transpose(2, 1, 0),  # [W, 1, C]
  ],
)
def test_short_convolutions_in_every_layout(tmp_path, order, stored):
  tensors, config = checkpoints.fla()
  straight = checkpoints.write(tmp_path / "straight", (tensors, config))
  for name in tensors:
    if "conv1d" in name:
      taps = tensors[name][:, :, :: -1 if order == "newest_first" else 1]
      tensors[name] = stored(taps)
  other = checkpoints.write(tmp_path / "other", (tensors, config))
  expected = open_model(straight, "fla", Options())
  found = open_model(other, "fla", Options(from_conv_order=order))
  assert expected.tensors.keys() == found.tensors.keys()
  for name, tensor in expected.tensors.items():
    assert np.array_equal(np.asarray(tensor), np.asarray(found.tensors[name]))


def test_the_order_of_the_taps_is_written_and_stated(ours, dialect, tmp_path):
  report = run(
    ours, tmp_path / "a", "gdn2_jax", dialect, to_conv_order="newest_first"
  )
  assert json.loads((tmp_path / "a" / "config.json").read_text())[
    "conv_order"
  ] == ("newest_first")
  tensors, _ = CHECKPOINTS[dialect]()
  found = checkpoints.read(tmp_path / "a")
  for name, value in tensors.items():
    step = -1 if "conv1d" in name else 1
    assert np.array_equal(found[name], value[..., ::step]), name
  run(tmp_path / "a", tmp_path / "b", dialect, "gdn2_jax")
  checkpoints.assert_same(
    checkpoints.read(tmp_path / "b"), checkpoints.read(ours)
  )
  assert report.parameters == sum(v.size for v in tensors.values())


def test_shards_with_an_index(tmp_path):
  tensors, config = checkpoints.fla()
  src = checkpoints.write(tmp_path / "src", (tensors, config))
  run(src, tmp_path / "ours", "fla", "gdn2_jax")
  report = convert(
    tmp_path / "ours",
    tmp_path / "back",
    source="gdn2_jax",
    target="fla",
    max_shard_bytes=20_000,
  )
  shards = [name for name in report.files if name.endswith(".safetensors")]
  assert len(shards) > 2
  found = {}
  for name in shards:
    found |= load_file(tmp_path / "back" / name)
  checkpoints.assert_same(found, tensors)
  run(tmp_path / "back", tmp_path / "again", "fla", "gdn2_jax")
  checkpoints.assert_same(
    checkpoints.read(tmp_path / "again"), checkpoints.read(tmp_path / "ours")
  )


def test_mixed_dtypes_are_widened_and_reported(tmp_path):
  tensors, config = checkpoints.fla()
  for name in tensors:
    if name.endswith("norm.weight"):
      tensors[name] = tensors[name].astype(np.float32)
    if name.endswith(("A_log", "dt_bias")):
      tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
  src = checkpoints.write(tmp_path / "src", (tensors, config))
  report = run(src, tmp_path / "ours", "fla", "gdn2_jax")
  assert "bfloat16, float32 -> float32" in str(report)
  assert any("A_log and dt_bias were stored in bf" in n for n in report.notes)
  run(tmp_path / "ours", tmp_path / "back", "gdn2_jax", "fla")
  for name, value in checkpoints.read(tmp_path / "back").items():
    assert np.array_equal(value, tensors[name].astype(np.float32)), name
  # Without a stop each tensor keeps its own, but for the float32 leaves.
  run(src, tmp_path / "same", "fla", "fla")
  for name, value in checkpoints.read(tmp_path / "same").items():
    kept = name.endswith(("A_log", "dt_bias"))
    assert value.dtype == (np.float32 if kept else tensors[name].dtype)


def test_dtype_rounds_all_but_the_float32_leaves(tmp_path):
  tensors, _ = checkpoints.official()
  report = run(
    checkpoints.OFFICIAL,
    tmp_path / "out",
    "official",
    "official",
    dtype="bfloat16",
  )
  assert "float32 -> bfloat16, float32" in str(report)
  for name, value in checkpoints.read(tmp_path / "out").items():
    kept = name.endswith(("A_log", "dt_bias"))
    dtype = np.float32 if kept else ml_dtypes.bfloat16
    assert np.array_equal(value, tensors[name].astype(dtype)), name


def test_what_is_not_finite_is_kept_and_reported(tmp_path):
  tensors, config = checkpoints.official()
  tensors["transformer.ln_f.weight"][:2] = np.nan, np.inf
  src = checkpoints.write(tmp_path / "src", (tensors, config))
  report = run(src, tmp_path / "out", "official", "gdn2_jax")
  assert report.notes == [
    "values that are not finite (kept): 2 in final_norm.weight"
  ]
  found = checkpoints.read(tmp_path / "out")["final_norm.weight"]
  assert np.array_equal(found, tensors["transformer.ln_f.weight"], True)


def test_a_tied_head_is_copied_on_request(tmp_path):
  tensors, config = checkpoints.fla()
  del tensors["lm_head.weight"]
  config["tie_word_embeddings"] = True
  src = checkpoints.write(tmp_path / "src", (tensors, config))
  report = run(src, tmp_path / "out", "fla", "fla", untie_head=True)
  found = checkpoints.read(tmp_path / "out")
  assert np.array_equal(
    found["lm_head.weight"], tensors["model.embeddings.weight"]
  )
  assert any("lm_head.weight: a copy of" in note for note in report.notes)
  written = json.loads((tmp_path / "out" / "config.json").read_text())
  assert written["tie_word_embeddings"] is False


@pytest.mark.slow
def test_a_workdir_of_training(tmp_path):
  with tarfile.open(WORKDIR) as archive:
    archive.extractall(tmp_path / "run", filter="data")
  BytesTokenizer().save(tmp_path / "run" / "tokenizer.json")
  report = run(tmp_path / "run", tmp_path / "ours", "gdn2_jax", "gdn2_jax")
  assert report.notes == [
    "checkpoint of step 2",
    "tokenizer.json left behind: 259 ids, more than the model has",
  ]
  config = load_model(tmp_path / "ours").config
  assert not config.scan_layers
  run(tmp_path / "run", tmp_path / "theirs", "gdn2_jax", "official", step=2)
  run(tmp_path / "theirs", tmp_path / "back", "official", "gdn2_jax")
  checkpoints.assert_same(
    checkpoints.read(tmp_path / "back"), checkpoints.read(tmp_path / "ours")
  )
  back = load_model(tmp_path / "back").config
  # What is not the model's, but how it is computed.
  same = dataclasses.replace(
    config, scan_layers=True, loss_chunk=back.loss_chunk
  )
  same.gdn2.implementation = ""
  same.gdn2.num_value_heads = same.gdn2.num_heads
  same.attention.num_kv_heads = same.attention.num_heads
  assert back == same


def test_tokenizers_go_where_they_can_be_read(tmp_path):
  config = ModelConfig(
    vocab_size=259,
    model_dim=16,
    num_layers=1,
    gdn2=GDN2Config(num_heads=1, key_dim=16, value_dim=16),
    mlp_dim=16,
  )
  save_model(
    tmp_path / "a", random_params(config), config, tokenizer=BytesTokenizer()
  )
  run(tmp_path / "a", tmp_path / "b", "gdn2_jax", "gdn2_jax")
  assert load_model(tmp_path / "b").tokenizer.encode("a") == [97]
  report = run(tmp_path / "b", tmp_path / "c", "gdn2_jax", "official")
  assert report.notes == [
    "tokenizer.json left behind: other programs cannot read it"
  ]
  bpe = train_bpe(["text of a corpus"], 257)
  bpe.save(tmp_path / "c" / "tokenizer.json")
  run(tmp_path / "c", tmp_path / "d", "official", "official")
  run(tmp_path / "d", tmp_path / "e", "official", "gdn2_jax")
  assert load_model(tmp_path / "e").tokenizer.to_json() == bpe.to_json()


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_published_number_of_parameters(preset):
  from gdn2_jax.interop.convert.claims import Claims, Shown
  from gdn2_jax.interop.convert.official import HARMLESS, read_config
  from gdn2_jax.interop.names import OFFICIAL, moves
  from gdn2_jax.interop.tree import param_specs

  values, expected = PRESETS[preset]
  every = values["gdn2_per_layer"]
  kinds = "".join("S" if n % every else "G" for n in range(18))
  shown = Shown(kinds, False, 32000, 2304, None, 16, 16, 16, 128, 128, 4, None)
  claims = Claims(values, "preset")
  config = read_config(claims, shown, "silu")
  claims.finish(harmless=HARMLESS)
  specs = param_specs(config)
  assert sum(spec.size for spec in specs.values()) == expected
  sizes = 0
  for move in moves(OFFICIAL, config):
    shapes = tuple(specs[name].shape for name in move.ours)
    sizes += np.prod(move.layout.theirs(*shapes))
  assert sizes == expected
