"""A run that starts from the parameters of another model."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax import load_model, save_model
from gdn2_jax.configs import finetune
from gdn2_jax.interop.convert import convert
from gdn2_jax.interop.tree import cast_params, flatten_params
from gdn2_jax.sharding import MeshConfig
from gdn2_jax.train import start
from gdn2_jax.train.checkpoint import load_run
from gdn2_jax.train.checkpoint.meta import CheckpointError
from gdn2_jax.train.loop import train
from gdn2_jax.train.report.writer import read_rows
from tests.interop.convert import checkpoints
from tests.train.conftest import make_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(cache_dir, dataset, tmp_path_factory):
  """A run of six steps, and its model as a published folder."""
  folder = tmp_path_factory.mktemp("source")
  config = make_config(cache_dir)
  train(config, folder / "run", dataset=dataset, say=lambda line: None)
  run = load_run(folder / "run")
  save_model(folder / "published", run.params, run.config.model, run.tokenizer)
  return folder


def make_fine(cache_dir, init_from):
  """One step that changes nothing: the parameters stay those of the start."""
  config = make_config(cache_dir)
  config.init_from = str(init_from)
  config.num_steps = 1
  config.optimizer.lr, config.optimizer.final_lr = 1e-12, 0.0
  return config


@pytest.mark.parametrize("kind", ["run", "published"])
def test_a_run_starts_from_the_parameters(
  kind, source, cache_dir, dataset, tmp_path
):
  lines = []
  config = make_fine(cache_dir, source / kind)
  result = train(config, tmp_path, dataset=dataset, say=lines.append)
  assert f"parameters from {source / kind}" in lines
  assert not [line for line in lines if "WARNING" in line]
  known = load_run(source / "run").params
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9),
    jax.device_get(result.state.params),
    jax.device_get(known),
  )
  # The loss goes on where the source's ended, not at log(260) = 5.56.
  (first,) = [
    row
    for row in read_rows(tmp_path / "metrics.jsonl")
    if row["kind"] == "train"
  ]
  last = read_rows(source / "run" / "metrics.jsonl")
  assert first["loss"] < next(r["loss"] for r in last if r["kind"] == "train")
  assert load_run(tmp_path).config.init_from == str(source / kind)
  # The optimizer is fresh: its counters have seen one step.
  counts = [
    leaf
    for leaf in jax.tree.leaves(result.state.opt_state)
    if leaf.dtype == jnp.int32 and leaf.ndim == 0
  ]
  assert counts and all(int(count) == 1 for count in counts)


def test_a_started_run_resumes_without_its_source(
  source, cache_dir, dataset, tmp_path
):
  shutil.copytree(source / "published", tmp_path / "model")
  config = make_fine(cache_dir, tmp_path / "model")
  train(config, tmp_path / "run", dataset=dataset, say=lambda line: None)
  shutil.rmtree(tmp_path / "model")
  config.num_steps = 2
  result = train(
    config, tmp_path / "run", dataset=dataset, say=lambda line: None
  )
  assert result.step == 2
  config.init_from = ""
  with pytest.raises(CheckpointError, match=r"--config\.init_from: '.*' -> ''"):
    train(config, tmp_path / "run", dataset=dataset, say=lambda line: None)


def test_rounded_parameters_and_another_layout(source, tmp_path, cache_dir):
  model = load_model(source / "published")
  half = dataclasses.replace(model.config, param_dtype="bfloat16")
  params = cast_params(model.params, half)
  save_model(tmp_path / "half", params, half, model.tokenizer)
  config = make_fine(cache_dir, tmp_path / "half")
  config.model.scan_layers = True
  opened = start.open_source(config)
  rounded = flatten_params(params, half)
  for name, value in opened.tensors.items():
    np.testing.assert_array_equal(np.asarray(value), rounded[name])


def test_changes_of_the_function_are_told(source, cache_dir, dataset, tmp_path):
  config = make_fine(cache_dir, source / "run")
  config.model.gdn2.output_gate = "sigmoid"
  lines = []
  train(config, tmp_path, dataset=dataset, say=lines.append)
  (warning,) = [line for line in lines if "WARNING" in line]
  assert "gdn2.output_gate: 'silu' -> 'sigmoid'" in warning


def test_other_shapes_are_refused_before_anything_is_written(
  source, cache_dir, dataset, tmp_path
):
  config = make_fine(cache_dir, source / "published")
  config.model.mlp_dim = 64
  with pytest.raises(ValueError, match=r"init_from=.*mlp.*--config=finetune:"):
    train(config, tmp_path / "run", dataset=dataset)
  assert not (tmp_path / "run" / "config.json").exists()


def test_another_tokenizer_is_refused(source, cache_dir, dataset, tmp_path):
  config = make_fine(cache_dir, source / "published")
  config.data.tokenizer = "bpe-300"
  config.model.vocab_size = 300
  with pytest.raises(ValueError, match=r"embedding\.table"):
    start.open_source(config)
  config = make_fine(cache_dir, source / "published")
  opened = start.open_source(config)
  with pytest.raises(ValueError, match="not the tokenizer of"):
    other = dataclasses.replace(opened, tokenizer=_Other())
    start.check_tokenizer(config, other, dataset.tokenizer)


class _Other:
  def to_json(self):
    return "{}"


def test_a_source_that_is_none(tmp_path):
  with pytest.raises(ValueError, match=r"init_from=.*: expected the workdir"):
    start.find_source(str(tmp_path))


@pytest.mark.parametrize("kind", ["run", "published"])
def test_the_finetune_config_takes_model_and_tokenizer(kind, source):
  config = finetune.get_config(str(source / kind))
  assert config.init_from == str(source / kind)
  expected = load_model(source / "published").config
  assert config.model == dataclasses.replace(expected, param_dtype="float32")
  assert config.data.tokenizer == str(source / kind / "tokenizer.json")
  with pytest.raises(ValueError, match="source is missing"):
    finetune.get_config()


def test_gates_of_a_converted_kda_untie(cache_dir, dataset, tmp_path):
  """At the start b = w = beta of the head; training tells them apart."""
  tensors, config = checkpoints.kda(2, 2, 2)
  rng, width = np.random.default_rng(0), checkpoints.WIDTH
  for name in ("model.embeddings.weight", "lm_head.weight"):
    tensors[name] = rng.normal(0, 0.3, (260, width)).astype(np.float32)
  src = checkpoints.write(
    tmp_path / "kda", (tensors, config | {"vocab_size": 260})
  )
  convert(src, tmp_path / "gdn2", source="fla", target="gdn2_jax")
  model = load_model(tmp_path / "gdn2")
  fine = make_fine(cache_dir, tmp_path / "gdn2")
  fine.model = dataclasses.replace(model.config, dtype="float32", loss_chunk=16)
  fine.mesh = MeshConfig(data=4, fsdp=2)
  fine.num_steps, fine.optimizer.lr, fine.grad_accum = 2, 1e-2, 1
  trained = train(
    fine, tmp_path / "run", dataset=dataset, say=lambda line: None
  )

  def spread(params, name):
    kernel = flatten_params(params, fine.model)[f"layers.0.mixer.{name}.kernel"]
    return np.ptp(kernel, axis=-1).max()  # over the channels of a head

  for name in ("b_proj", "w_proj"):
    assert spread(model.params, name) == 0
    assert spread(trained.state.params, name) > 1e-4
