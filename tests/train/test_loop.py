"""Whole runs in this process, on a 2 x 2 x 2 mesh of fake devices."""

import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from gdn2_jax.config_json import from_json
from gdn2_jax.train.checkpoint import load_run
from gdn2_jax.train.checkpoint.meta import (
  CheckpointError,
  committed_steps,
  read_meta,
)
from gdn2_jax.train.config import TrainConfig
from gdn2_jax.train.loop import train
from gdn2_jax.train.processes.lock import LockedError, WorkdirLock
from gdn2_jax.train.report.interval import Interval
from gdn2_jax.train.report.report import DivergedError, Report
from gdn2_jax.train.report.writer import read_rows
from tests.train.conftest import make_config


class Faulty:
  """A dataset that does something at chosen steps.

  Args:
    dataset: the real one.
    faults: {step (from 0): function of the batch that returns a batch}.
  """

  def __init__(self, dataset, faults):
    self._dataset = dataset
    self._faults = faults

  def __getattr__(self, name):
    return getattr(self._dataset, name)

  def train_batches(self, start_step=0, **hosts):
    batches = self._dataset.train_batches(start_step=start_step, **hosts)
    for step, batch in enumerate(batches, start_step):
      yield self._faults.get(step, lambda b: b)(batch)


def poisoned(batch):
  mask = batch["loss_mask"].copy()
  mask[0, 0] = np.nan
  return batch | {"loss_mask": mask}


@pytest.fixture
def unchecked(monkeypatch):
  """Lets poisoned batches through to the device."""
  monkeypatch.setattr("gdn2_jax.train.loop.check_batch", lambda *_: None)


def interrupted(batch):
  os.kill(os.getpid(), signal.SIGTERM)
  return batch


def bits(state):
  leaves = jax.tree_util.tree_flatten_with_path(jax.device_get(state))[0]
  return {
    jax.tree_util.keystr(path): np.asarray(x).tobytes() for path, x in leaves
  }


def losses(workdir):
  rows = read_rows(workdir / "metrics.jsonl")
  return [
    (r["step"], r["loss"], r["grad_norm"], r["lr"])
    for r in rows
    if r["kind"] == "train"
  ]


@pytest.fixture(scope="module")
def straight(dataset, cache_dir, tmp_path_factory):
  """An uninterrupted run: (workdir, result, printed lines)."""
  workdir = tmp_path_factory.mktemp("straight") / "run"
  lines = []
  config = make_config(cache_dir)
  config.eval.every_steps = 3
  config.report.gates = True
  result = train(config, workdir, dataset=dataset, say=lines.append)
  return workdir, result, lines


def test_a_run_leaves_everything_behind(straight):
  workdir, result, lines = straight
  assert (result.step, result.stopped_by) == (6, "")
  assert committed_steps(workdir / "checkpoints") == [4, 6]
  rows = read_rows(workdir / "metrics.jsonl")
  kinds = [(row["step"], row["kind"]) for row in rows]
  steps = [(step, "train") for step in range(1, 7)]
  assert kinds == [*steps[:3], (3, "eval"), *steps[3:], (6, "final")]
  assert rows[-1]["loss_1x"] < np.log(260)
  config = from_json(TrainConfig, (workdir / "config.json").read_text())
  assert config.num_steps == 6
  assert "jax" in json.loads((workdir / "versions.json").read_text())
  evaluation = json.loads((workdir / "eval.json").read_text())
  model = evaluation["model"]["1x"]
  assert model["nats_per_token"] == rows[-1]["loss_1x"]
  baselines = evaluation["baselines"].values()
  assert {report["tokens"] for report in baselines} == {model["tokens"]}
  assert (workdir / "loss.png").stat().st_size > 10_000
  table = "\n".join(lines)
  for name in ("model 1x", "unigram", "bigram", "bits/byte"):
    assert name in table
  assert any(line.startswith("step      6/6  loss") for line in lines)


def test_the_result_has_the_metrics_of_the_run(straight):
  workdir, result, _ = straight
  assert list(result.rows) == read_rows(workdir / "metrics.jsonl")
  steps, values = result.losses
  np.testing.assert_array_equal(steps, np.arange(1, 7))
  assert values.tolist() == [loss for _, loss, *_ in losses(workdir)]
  assert result.curve("lr")[1].max() == pytest.approx(1e-2)
  steps, values = result.curve("loss_1x", "eval")
  assert steps.tolist() == [3, 6] and values[1] < values[0]
  # 8 rows of 16 tokens.
  assert result.curve("tokens_seen")[1].tolist() == [
    128 * n for n in range(1, 7)
  ]
  # Statistics of the gates, computed on the mesh.
  for name, low, high in (("half_life", 0, 1e4), ("erase", 0, 1)):
    steps, values = result.curve(f"gates/{name}/layer_0", "eval")
    assert steps.tolist() == [3, 6]
    assert np.all((low < values) & (values < high)) and values[0] != values[1]
  with pytest.raises(ValueError, match=r"name='los': expected one of .*loss"):
    result.curve("los")


def test_the_run_can_be_loaded(straight):
  workdir, result, _ = straight
  run = load_run(workdir)
  assert run.step == 6
  for x, y in zip(
    jax.tree.leaves(run.params),
    jax.tree.leaves(result.state.params),
    strict=True,
  ):
    np.testing.assert_array_equal(x, y)


# Step 2 has just been saved when the signal of step 2 comes; step 3 has not.
@pytest.mark.parametrize(("step", "log_every"), [(2, 1), (3, 3)])
def test_sigterm_saves_and_resume_is_bit_exact(
  config, dataset, straight, tmp_path, step, log_every
):
  config.log_every = log_every
  before = signal.getsignal(signal.SIGTERM)
  lines = []
  faulty = Faulty(dataset, {step: interrupted})
  stopped = train(config, tmp_path, dataset=faulty, say=lines.append)
  assert (stopped.step, stopped.stopped_by) == (step + 1, "SIGTERM")
  assert lines[-1] == f"SIGTERM: saved step {step + 1}, stopping"
  assert committed_steps(tmp_path / "checkpoints")[-1] == step + 1
  assert signal.getsignal(signal.SIGTERM) == before
  # The same command again.
  result = train(config, tmp_path, dataset=dataset, say=lines.append)
  assert f"resumed from step {step + 1}" in lines
  workdir, expected, _ = straight
  assert bits(result.state) == bits(expected.state)
  # A row is the mean of its steps, some of them before the interruption.
  every = [r for r in read_rows(workdir / "metrics.jsonl") if "loss" in r]
  want, names = [], ("loss", "grad_norm", "lr", "tokens")
  for end in range(log_every, 7, log_every):
    interval, part = Interval(), every[end - log_every : end]
    for row in part:
      interval.add({name: row[name] for name in names})
    row = interval.take({name: part[-1][name] for name in names})
    want.append((end, row["loss"], row["grad_norm"], row["lr"]))
  assert losses(tmp_path) == want


@pytest.mark.slow
def test_a_run_resumes_with_its_layers_unrolled(
  config, dataset, tmp_path, monkeypatch
):
  monkeypatch.setattr(Report, "finish", lambda *_: None)
  config.model.scan_layers = True
  config.model.num_layers, config.model.pattern = 2, "S"
  assert config.model.num_groups == 2
  straight, changed = tmp_path / "straight", tmp_path / "changed"
  train(config, straight, dataset=dataset, say=lambda _: None)
  faulty = Faulty(dataset, {3: interrupted})
  train(config, changed, dataset=faulty, say=lambda _: None)
  config.model.scan_unroll = 0
  lines = []
  train(config, changed, dataset=dataset, say=lines.append)
  assert "resumed from step 4" in lines
  # Neither names nor shapes of what is saved depend on it.
  checkpoints = changed / "checkpoints"
  before, after = (read_meta(checkpoints, step)["tree"] for step in (4, 6))
  assert before == after
  want, got = losses(straight), losses(changed)
  assert got[:4] == want[:4]
  # Steps of another program, which sums in another order.
  np.testing.assert_allclose(got[4:], want[4:], rtol=1e-5)


def test_finished_run_does_not_train_on(straight, config, dataset, tmp_path):
  workdir, expected, _ = straight
  shutil.copytree(workdir, tmp_path / "run")
  result = train(config, tmp_path / "run", dataset=dataset, say=lambda _: None)
  assert bits(result.state) == bits(expected.state)
  rows = read_rows(tmp_path / "run" / "metrics.jsonl")
  assert [r["kind"] for r in rows].count("final") == 1


@pytest.mark.usefixtures("unchecked")
def test_bad_batches_are_skipped_and_counted(config, dataset, tmp_path):
  lines = []
  faulty = Faulty(dataset, {1: poisoned, 3: poisoned})
  result = train(config, tmp_path, dataset=faulty, say=lines.append)
  assert int(result.state.skipped) == 2
  assert int(result.state.skipped_in_a_row) == 0
  assert result.step == int(result.state.step) == 6
  assert sum("update skipped (1 in a row)" in line for line in lines) == 2
  rows = read_rows(tmp_path / "metrics.jsonl")
  assert [r["loss"] is None for r in rows[:6]] == [
    step in (2, 4) for step in range(1, 7)
  ]


@pytest.mark.usefixtures("unchecked")
def test_too_many_bad_batches_in_a_row_end_the_run(config, dataset, tmp_path):
  faulty = Faulty(dataset, {3: poisoned, 4: poisoned})
  with pytest.raises(DivergedError, match="steps 4 to 5: 2 batches in a row"):
    train(config, tmp_path, dataset=faulty, say=lambda _: None)
  # What is on disk is finite.
  run = load_run(tmp_path)
  assert run.step in (2, 4)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(run.params))


@pytest.mark.parametrize(
  ("path", "value", "message"),
  [
    ("model.mlp_dim", 48, "model.mlp_dim: 32 -> 48"),
    ("model.param_dtype", "bfloat16", "param_dtype: 'float32' -> 'bfloat16'"),
    ("data.seed", 7, "allow_data_change"),
  ],
)
def test_a_checkpoint_of_another_run_is_refused(
  straight, config, tmp_path, path, value, message
):
  workdir, _, _ = straight
  part, name = path.split(".")
  setattr(getattr(config, part), name, value)
  rows = (workdir / "metrics.jsonl").read_text()
  with pytest.raises(CheckpointError, match=message):
    train(config, workdir, say=lambda _: None)
  assert (workdir / "metrics.jsonl").read_text() == rows
  assert committed_steps(workdir / "checkpoints") == [4, 6]


def test_workdir_in_use_is_refused(config, dataset, tmp_path):
  with WorkdirLock(tmp_path), pytest.raises(LockedError, match="in use by"):
    train(config, tmp_path, dataset=dataset, say=lambda _: None)


def test_vocabulary_smaller_than_the_tokenizer_is_refused(
  config, dataset, tmp_path
):
  config.model.vocab_size = 100
  with pytest.raises(ValueError, match="vocab_size=100: the tokenizer 'bytes'"):
    train(config, tmp_path, dataset=dataset, say=lambda _: None)


def test_ids_out_of_range_are_refused_on_the_host(config, dataset, tmp_path):
  def broken(batch):
    inputs = batch["inputs"].copy()
    inputs[0, 0] = 260
    return batch | {"inputs": inputs}

  with pytest.raises(ValueError, match="260"):
    train(
      config,
      tmp_path,
      dataset=Faulty(dataset, {0: broken}),
      say=lambda _: None,
    )
