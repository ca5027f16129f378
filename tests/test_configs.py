"""Every config file resolves to what it says, and to what it said before."""

import importlib
import os
import pathlib

import pytest

from gdn2_jax.config_json import from_json, to_json
from gdn2_jax.model.accounting import count_parameters, state_bytes
from gdn2_jax.train.config import TrainConfig, validate

ROOT = pathlib.Path(__file__).parent.parent
NAMES = sorted(
  path.stem
  for path in (ROOT / "configs").glob("*.py")
  # finetune depends on the model that it starts from: tests/train/test_start.py
  if path.stem not in ("__init__", "finetune")
)


def load(name, *args):
  return importlib.import_module(f"gdn2_jax.configs.{name}").get_config(*args)


@pytest.mark.parametrize("name", NAMES)
def test_resolved_config_is_the_recorded_one(name):
  """A change of any default shows here; UPDATE_GOLDEN=1 records it."""
  config = load(name)
  validate(config)
  text = to_json(config)
  assert from_json(TrainConfig, text) == config
  golden = ROOT / "tests" / "golden" / f"{name}.json"
  if os.environ.get("UPDATE_GOLDEN"):
    golden.write_text(text)
  assert text == golden.read_text()


@pytest.mark.parametrize("name", NAMES)
def test_docstring_states_claim_cost_and_command(name):
  text = importlib.import_module(f"gdn2_jax.configs.{name}").__doc__
  for word in ("Claim:", "Cost:", f"--config=configs/{name}.py"):
    assert word in text


@pytest.mark.parametrize(
  "name,blocks,total",
  [
    ("gdn2_1p3b", 1_302_638_112, 1_450_096_416),
    ("gdn2_swa_1p3b", 1_300_314_384, 1_447_772_688),
  ],
)
def test_presets_have_the_papers_parameter_counts(name, blocks, total):
  count = count_parameters(load(name).model)
  assert (count.blocks, count.total) == (blocks, total)


def test_state_of_the_recurrent_preset():
  """18 layers of 16 x 128 x 128 float32, and three bf16 conv tails each."""
  state, tails = 18 * 16 * 128 * 128 * 4, 18 * 3 * (3 * 2048) * 2
  assert state_bytes(load("gdn2_1p3b").model) == {"G": state + tails}


@pytest.mark.parametrize("name", ["gdn2_1p3b", "gdn2_swa_1p3b"])
def test_recipes(name):
  paper, script = load(name), load(name, "script")
  assert paper.data.batch_size * paper.data.seq_len == 2**19  # 0.5M
  assert script.data.batch_size * script.data.seq_len == 2**22  # 4.19M
  for config in (paper, script):
    tokens = config.num_steps * config.data.batch_size * config.data.seq_len
    assert tokens == pytest.approx(100e9, rel=1e-4)
  with pytest.raises(ValueError, match="recipe 'half'"):
    load(name, "half")
