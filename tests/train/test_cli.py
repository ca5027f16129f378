"""The real command: kills, signals, relaunches and refused command lines."""

import os
import re
import shutil
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from gdn2_jax.train.checkpoint.meta import committed_steps
from tests.faults.child import Child, train_rows
from tests.tiny_run import run_many

_CONFIG = """
from gdn2_jax.sharding import MeshConfig
from tests.train.conftest import make_config

def get_config():
  config = make_config({cache_dir!r})
  config.mesh = MeshConfig()
  config.num_steps = 240
  config.checkpoint.every_steps = 20
  return config
"""


@pytest.fixture(scope="module")
def config_file(cache_dir, tmp_path_factory):
  path = tmp_path_factory.mktemp("config") / "tiny.py"
  path.write_text(_CONFIG.format(cache_dir=cache_dir))
  return path


def arrays(workdir):
  step = workdir / "checkpoints" / "240"
  with ocp.StandardCheckpointer() as reader:
    trees = [reader.restore(step / item) for item in ("params", "optimizer")]
  return [np.asarray(x) for x in jax.tree.leaves(trees)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_killed_runs_resume_bit_for_bit(config_file, tmp_path):
  straight, killed = tmp_path / "straight", tmp_path / "killed"
  run = Child(config_file, straight)
  assert run.end() == 0, run.output
  assert "sample:\nReturn the" in run.output
  assert f"gdn2_jax.generate --workdir={straight}" in run.output
  assert os.stat(straight / ".jax_cache").st_mode & 0o077 == 0
  killed.mkdir()
  shutil.copytree(straight / ".jax_cache", killed / ".jax_cache")

  run = Child(config_file, killed)
  assert run.wait_for_step(45), run.output
  run.send(signal.SIGTERM)
  assert run.end() == 0, run.output
  saved = int(re.search(r"SIGTERM: saved step (\d+), stopping", run.output)[1])
  assert 45 <= saved < 240
  assert committed_steps(killed / "checkpoints")[-1] == saved

  run = Child(config_file, killed)
  assert run.wait_for_step(saved + 75), run.output
  assert run.kill() == -signal.SIGKILL
  assert run.resumed_from == saved

  run = Child(config_file, killed)
  assert run.end() == 0, run.output
  assert saved < run.resumed_from < 240
  assert train_rows(killed) == train_rows(straight)
  for x, y in zip(arrays(killed), arrays(straight), strict=True):
    assert x.dtype == y.dtype
    assert x.tobytes() == y.tobytes()


def test_refused_command_lines(config_file, tmp_path):
  base = [f"--config={config_file}", f"--workdir={tmp_path / 'run'}"]
  cases = {
    "error: --config.optimizer.lrr: unknown field; did you mean": [
      *base,
      "--config.optimizer.lrr=1",
    ],
    "invalid literal for int() with base 10: 'x'": [
      *base,
      "--config.num_steps=x",
    ],
    "could not convert string to float: 'fast'": [
      *base,
      "--config.optimizer.lr=fast",
    ],
    "unexpected argument 'config.num_steps=3'": [*base, "config.num_steps=3"],
    "error: --config.grad_accum=3 does not divide": [
      *base,
      "--config.grad_accum=3",
    ],
    "error: --config.optimizer.lr=-1.0: expected a positive": [
      *base,
      "--config.optimizer.lr=-1",
    ],
    "error: --config.data.batch_size=0": [*base, "--config.data.batch_size=0"],
    "--config.optimizer.warmup_fraction=1.5: expected 0 <= x < 1": [
      *base,
      "--config.optimizer.warmup_fraction=1.5",
    ],
    "--config.mesh.fsdp=3": [*base, "--config.mesh.fsdp=3"],
    "--config.model.gdn2.num_heads=0": [
      *base,
      "--config.model.gdn2.num_heads=0",
    ],
    "--config.watchdog_seconds=-1.0: expected 0 or more": [
      *base,
      "--config.watchdog_seconds=-1",
    ],
    "--config.checkpoint.max_failed_saves=0: expected 1 or more": [
      *base,
      "--config.checkpoint.max_failed_saves=0",
    ],
    "error: --config is missing": [base[1]],
    "error: --workdir is missing": [base[0]],
    "error: --config=nowhere.py: no such file": [
      "--config=nowhere.py",
      base[1],
    ],
    "cannot write there": [base[0], f"--workdir={config_file}/run"],
  }
  results = run_many("gdn2_jax.train.__main__", list(cases.values()))
  for message, result in zip(cases, results, strict=True):
    shown = result["out"] + result["err"]
    assert result["code"] == 1, (message, shown)
    assert message in shown
    assert "Traceback" not in shown
    # Before anything is allocated.
    assert result["arrays"] == 0, message
  # Nothing was made for a command line that was refused.
  assert not (tmp_path / "run").exists()


def test_data_that_does_not_fit_is_refused_before_any_array(
  config_file, tmp_path
):
  """These need the data, or another number of devices, to be seen."""
  base = [f"--config={config_file}", f"--workdir={tmp_path / 'run'}"]
  cases = {
    "--config.model.vocab_size=100: the tokenizer 'bytes' has": [
      *base,
      "--config.model.vocab_size=100",
    ],
    "data.source='nowhere'": [*base, "--config.data.source=nowhere"],
    "restore_step=7: no such checkpoint; have none": [
      *base,
      "--config.checkpoint.restore_step=7",
    ],
  }
  results = run_many("gdn2_jax.train.__main__", list(cases.values()))
  for message, result in zip(cases, results, strict=True):
    assert result["code"] == 1, (message, result)
    assert message in result["err"], result["err"]
    assert "Traceback" not in result["err"]
    assert result["arrays"] == 0, message
