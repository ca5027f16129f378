"""Models of every mixer: training, resuming, writing, publishing, exporting."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.data.tokenizer.api import BytesTokenizer
from gdn2_jax.inference.generate import generate
from gdn2_jax.inference.sampling import GREEDY
from gdn2_jax.interop import load_model, save_model
from gdn2_jax.interop.export.program import export_programs
from gdn2_jax.model.lm import LM, has_growing_cache
from gdn2_jax.train.checkpoint import load_run
from gdn2_jax.train.config import preflight
from gdn2_jax.train.loop import train
from gdn2_jax.train.report.report import Report
from tests.model.models import small_mamba
from tests.random_params import random_params
from tests.train.conftest import make_config
from tests.train.test_loop import Faulty, bits, interrupted, losses

PROMPTS = [[3, 1, 4, 1, 5, 9], [7]]
NEW = 8


def config_of(pattern, cache_dir):
  config = make_config(cache_dir)
  config.model.pattern, config.model.num_layers = pattern, len(pattern)
  for name, mixer in small_mamba("reference").items():
    setattr(config.model, name, mixer)
  config.grad_accum = 1
  return config


def chain(config, params):
  """Every prompt continued by the argmax of a full forward pass per token."""
  forward = jax.jit(lambda t: LM(config).apply({"params": params}, t)[0])
  rows = []
  for prompt in PROMPTS:
    row = list(prompt)
    while len(row) < len(prompt) + NEW:
      tokens = np.zeros((1, 16), np.int32)  # causal: the tail is ignored
      tokens[0, : len(row)] = row
      row.append(int(jnp.argmax(forward(tokens)[0, len(row) - 1])))
    rows.append(row[len(prompt) :])
  return rows


@pytest.mark.deep
def test_cached_tokens_are_those_of_the_forward_and_models_are_published(
  cache_dir, tmp_path
):
  config = config_of("MN", cache_dir).model
  params = random_params(config)
  assert_writes_and_publishes(config, params, tmp_path)


def assert_writes_and_publishes(config, params, folder):
  written = generate(
    params, config, PROMPTS, NEW, rng=jax.random.key(0), sampler=GREEDY
  )
  assert written == chain(config, params)
  save_model(folder / "model", params, config)
  back = load_model(folder / "model")
  assert back.config == config
  jax.tree.map(np.testing.assert_array_equal, back.params, params)
  return written


@pytest.mark.slow
# Mixers share a run; only one with A has a cache that grows with the tokens.
@pytest.mark.parametrize(
  "pattern",
  [*(pytest.param(p, marks=pytest.mark.deep) for p in ("KDES", "MNS")), "A"],
)
def test_a_run_trains_resumes_writes_and_is_published(
  pattern, cache_dir, dataset, tmp_path, monkeypatch
):
  monkeypatch.setattr(Report, "finish", lambda *_: None)
  config = config_of(pattern, cache_dir)
  straight, stopped = tmp_path / "straight", tmp_path / "stopped"
  want = train(config, straight, dataset=dataset, say=lambda _: None)
  faulty = Faulty(dataset, {2: interrupted})
  train(config, stopped, dataset=faulty, say=lambda _: None)
  got = train(config, stopped, dataset=dataset, say=lambda _: None)
  assert got.step == want.step == 6
  assert bits(got.state) == bits(want.state)
  curve = [loss for _, loss, *_ in losses(straight)]
  assert curve == [loss for _, loss, *_ in losses(stopped)]
  assert curve[-1] < curve[0] - 0.3  # nats; a guess costs log(260) = 5.6
  run = load_run(straight)
  want = assert_writes_and_publishes(run.config.model, run.params, tmp_path)
  exported = export(run.config.model, run.params, tmp_path / "exported")
  assert exported.generate(PROMPTS, NEW) == want


def export(config, params, folder):
  longest = 32 if has_growing_cache(config) else None
  files = export_programs(config, chunk_size=16, max_length=longest, eos_id=256)
  save_model(folder, params, config, BytesTokenizer(), extra=files)
  spec = importlib.util.spec_from_file_location("exported", folder / "run.py")
  run = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(run)
  return run.load(str(folder))


def test_meshes_that_do_not_fit_are_refused(cache_dir):
  config = config_of("MN", cache_dir)
  preflight(config, 8)
  config.model.mamba2.inner_dim = 48
  with pytest.raises(ValueError, match=r"mamba2.inner_dim / head_dim gives 3"):
    preflight(config, 8)
  config = config_of("N", cache_dir)
  config.mesh.context, config.mesh.tensor = 2, 1
  with pytest.raises(
    ValueError, match=r"mesh.context=2: .* Mamba-3 in pattern"
  ):
    preflight(config, 8)
  config = config_of("M", cache_dir)
  config.mesh.context, config.mesh.tensor = 2, 1
  preflight(config, 8)
  config.data.seq_len = 4
  with pytest.raises(ValueError, match=r"Mamba-2 needs 3"):
    preflight(config, 8)
