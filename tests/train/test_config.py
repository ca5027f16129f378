"""Validation, pre-flight checks and JSON of the config tree."""

import dataclasses
import json
import re

import pytest

from gdn2_jax.config_json import from_json, to_json
from gdn2_jax.sharding import MeshConfig
from gdn2_jax.train.config import (
  TrainConfig,
  describe_fields,
  differences,
  preflight,
  validate,
)
from tests.train.conftest import make_hybrid


@pytest.fixture
def config(cache_dir):
  return make_hybrid(cache_dir)


def change(config, path, value):
  *parents, name = path.split(".")
  for parent in parents:
    config = getattr(config, parent)
  setattr(config, name, value)


def test_the_defaults_are_valid():
  validate(TrainConfig())


@pytest.mark.parametrize(
  ("path", "value"),
  [
    ("num_steps", 0),
    ("grad_accum", 3),
    ("log_every", 0),
    ("max_skipped", 0),
    ("data.seq_len", 0),
    ("data.batch_size", -1),
    ("checkpoint.keep", 0),
    ("checkpoint.every_steps", -1),
    ("eval.batches", -1),
    ("eval.length_multiples", (1, 0)),
    ("model.num_layers", 3),
    ("model.gdn2.key_dim", 8),
    ("optimizer.lr", -1.0),
    ("num_steps", "6"),
    ("num_steps", 6.0),
    ("num_steps", True),
    ("model.pattern", None),
    ("eval.length_multiples", (1, "2")),
  ],
)
def test_validate_names_the_flag_and_the_value(config, path, value):
  validate(config)
  change(config, path, value)
  with pytest.raises(ValueError, match=rf"--config\.{re.escape(path)}") as info:
    validate(config)
  shown = value[-1] if isinstance(value, tuple) else value
  assert repr(shown) in str(info.value)
  assert "\n" not in str(info.value)


@pytest.mark.parametrize(
  ("path", "value", "mesh", "message"),
  [
    ("num_steps", 6, {"data": 4}, "mesh needs 4 devices"),
    ("grad_accum", 2, {"data": 8}, "batch_size / --config.grad_accum gives 4"),
    ("model.model_dim", 36, {"fsdp": 8}, "model_dim gives 36 along 'embed'"),
    ("model.mlp_dim", 33, {"data": 4, "tensor": 2}, "mlp_dim gives 33"),
    ("model.vocab_size", 261, {"data": 4, "tensor": 2}, "vocab_size gives 261"),
    ("num_steps", 6, {"data": 2, "tensor": 4}, "gdn2.num_heads gives 2 along"),
    (
      "model.gdn2.num_heads",
      4,
      {"data": 2, "tensor": 4},
      "attention.num_heads gives 2 along 'heads'.*tensor=4",
    ),
    ("data.seq_len", 36, {"context": 8}, "seq_len gives 36 along 'length'"),
    ("data.seq_len", 16, {"context": 8}, "context=8 leaves 2 .* needs 3"),
    ("model.model_dim", 36, {"context": 8}, "model_dim gives 36 along 'embed'"),
  ],
)
def test_preflight_names_dimension_and_axis(config, path, value, mesh, message):
  change(config, path, value)
  config.mesh = MeshConfig(**mesh)
  validate(config)
  with pytest.raises(ValueError, match=message):
    preflight(config, 8)


def test_preflight_splits_the_batch_over_processes(config):
  preflight(config, 8, num_processes=4)
  with pytest.raises(ValueError, match="over 3 processes"):
    preflight(config, 8, num_processes=3)


def test_json_round_trip(config):
  text = to_json(config)
  assert from_json(TrainConfig, text) == config
  assert hash(from_json(TrainConfig, text)) == hash(config)
  # Every field is spelled out.
  assert json.loads(text)["model"]["gdn2"]["conv_width"] == 4
  assert from_json(TrainConfig, "{}") == TrainConfig()


@pytest.mark.parametrize(
  ("edit", "message"),
  [
    (
      {"steps": 3},
      "config.steps: unknown field; did you mean config.num_steps",
    ),
    (
      {"optimizer": {"beta": 1}},
      "optimizer.beta: unknown field; OptimizerConfig has name",
    ),
    ({"num_steps": "3"}, "config.num_steps='3': expected int, got str"),
    ({"num_steps": True}, "config.num_steps=True: expected int, got bool"),
    ({"optimizer": {"lr": None}}, "config.optimizer.lr=None: expected float"),
    ({"model": 3}, "config.model=3: expected an object of ModelConfig"),
    ({"eval": {"length_multiples": [1, 2.0]}}, r"length_multiples\[1\]=2.0"),
  ],
)
def test_json_of_another_shape_is_refused(edit, message):
  with pytest.raises(ValueError, match=message):
    from_json(TrainConfig, json.dumps(edit))


def test_broken_json_is_refused():
  with pytest.raises(ValueError, match="not valid JSON"):
    from_json(TrainConfig, "{")


def test_whole_numbers_are_floats_where_floats_belong():
  lr = from_json(TrainConfig, '{"optimizer": {"lr": 1}}').optimizer.lr
  assert lr == 1.0
  assert isinstance(lr, float)


def test_differences(config):
  old = dataclasses.asdict(config)
  config.optimizer.lr = 0.5
  config.eval.length_multiples = (1, 2)
  lines = list(differences(old, dataclasses.asdict(config), "--config"))
  assert lines == [
    "--config.eval.length_multiples: (1,) -> (1, 2)",
    "--config.optimizer.lr: 0.01 -> 0.5",
  ]
  # JSON turns tuples into lists; that is no difference.
  saved = json.loads(to_json(config))
  assert not list(differences(saved, dataclasses.asdict(config)))


def test_every_field_is_described():
  lines = list(describe_fields(TrainConfig()))
  assert "--config.optimizer.lr=0.0004" in lines
  assert "--config.model.gdn2.conv_width=4" in lines
