"""Keys of the public program's config: checked where they matter."""

import json

import pytest

from gdn2_jax.interop.convert.options import Options
from gdn2_jax.interop.convert.run import convert, open_model
from gdn2_jax.interop.folder import load_model
from tests.interop.convert import checkpoints

# Other values that change nothing without layers of attention.
WITHOUT_EFFECT = {
  "org": "",
  "name": "mine",
  "block_size": 1,
  "n_head": 3,
  "rotary_percentage": 0.5,
  "local_window": -1,
  "nope": True,
  "mamba_init": False,
  "n_query_groups": 7,
  "condense_ratio": 4,
}


def config_of(folder, checkpoint, **changes):
  """The config that is read where some keys have other values."""
  tensors, config = checkpoint
  checkpoints.write(folder, (tensors, config | changes))
  return open_model(folder, "official", Options()).config


def test_a_recurrent_model_with_every_key(tmp_path):
  tensors, config = checkpoints.official_recurrent()
  src = checkpoints.write(tmp_path / "src", (tensors, config))
  ours, back = tmp_path / "ours", tmp_path / "back"
  convert(src, ours, source="official", target="gdn2_jax")
  found = load_model(ours).config
  assert (found.pattern, found.num_layers) == ("G", 2)
  assert (found.vocab_size, found.model_dim, found.mlp_dim) == (128, 64, 160)
  convert(ours, back, source="gdn2_jax", target="official")
  checkpoints.assert_same(checkpoints.read(back), tensors)
  written = json.loads((back / "config.json").read_text())
  # Padding rows are rows: the vocabulary is written as large as the table.
  for key in set(written) & set(config) - {*WITHOUT_EFFECT, "vocab_size"}:
    assert written[key] == config[key], key


@pytest.mark.parametrize("key", WITHOUT_EFFECT)
def test_keys_without_effect_on_a_recurrent_model(tmp_path, key):
  checkpoint = checkpoints.official_recurrent()
  change = {key: WITHOUT_EFFECT[key]}
  assert checkpoint[1][key] != change[key]
  assert config_of(tmp_path / "a", checkpoint) == config_of(
    tmp_path / "b", checkpoint, **change
  )


@pytest.mark.parametrize(
  ("make", "changes", "match"),
  [
    (
      checkpoints.official,
      {"rotary_percentage": 0.5},
      "config.json: rotary_percentage=0.5: expected 1.0, nothing else",
    ),
    (
      checkpoints.official,
      {"nope": True},
      "nope=True: expected False, nothing",
    ),
    (
      checkpoints.official,
      {"condense_ratio": 2},
      "condense_ratio=2: expected 1",
    ),
    (
      checkpoints.official,
      {"condense_ratio": True},
      "=True: expected 1, nothi",
    ),
    (
      checkpoints.official_recurrent,
      {"parallel_residual": True},
      "parallel_residual=True: expected False, nothing else",
    ),
    (
      checkpoints.official_recurrent,
      {"_norm_class": "LayerNorm"},
      "_norm_class='LayerNorm': expected 'RMSNorm' or 'FusedRMSNorm', nothing",
    ),
    (
      checkpoints.official_recurrent,
      {"token_mixer": "rwkv7_time"},
      "token_mixer='rwkv7_time': expected 'gdn2', nothing else",
    ),
    (
      checkpoints.official_recurrent,
      {"padded_vocab_size": 192},
      "padded_vocab_size=192, but the tensors have 128",
    ),
    (
      checkpoints.official_recurrent,
      {"rotary_percent": 0.5, "soft_cap": 30},
      "unknown keys rotary_percent (did you mean rotary_percentage?), soft_cap:"
      " they may change what the model computes; if they do not, pass "
      "--ignore_config=rotary_percent,soft_cap",
    ),
  ],
)
def test_what_is_refused(tmp_path, make, changes, match):
  with pytest.raises(ValueError) as e:
    config_of(tmp_path, make(), **changes)
  assert match in str(e.value)
  assert "\n" not in str(e.value)
