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
from tests.train.conftest import make_hybrid

def get_config():
  config = make_hybrid({cache_dir!r})
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


# The message: the flag that makes it, beside --config and --workdir
REFUSED = {
  "error: --config.optimizer.lrr: unknown field; did you mean": (
    "--config.optimizer.lrr=1"
  ),
  "invalid literal for int() with base 10: 'x'": "--config.num_steps=x",
  "could not convert string to float: 'fast'": "--config.optimizer.lr=fast",
  "unexpected argument 'config.num_steps=3'": "config.num_steps=3",
  "error: --config.grad_accum=3 does not divide": "--config.grad_accum=3",
  "error: --config.optimizer.lr=-1.0: expected a positive": (
    "--config.optimizer.lr=-1"
  ),
  "error: --config.data.batch_size=0": "--config.data.batch_size=0",
  "--config.optimizer.warmup_fraction=1.5: expected a number x with": (
    "--config.optimizer.warmup_fraction=1.5"
  ),
  "--config.mesh.fsdp=3": "--config.mesh.fsdp=3",
  "--config.model.gdn2.num_heads=0": "--config.model.gdn2.num_heads=0",
  "--config.watchdog_seconds=-1.0: expected 0 or more": (
    "--config.watchdog_seconds=-1"
  ),
  "--config.checkpoint.max_failed_saves=0: expected 1 or more": (
    "--config.checkpoint.max_failed_saves=0"
  ),
  "error: --config is missing": "--config=",
  "error: --workdir is missing": "--workdir=",
  "error: --config=nowhere.py: no such file": "--config=nowhere.py",
  "cannot write there": "--workdir={config_file}/run",
}
# These need the data, or the workdir, to be seen.
REFUSED_LATER = {
  "--config.model.vocab_size=100: the tokenizer 'bytes' has": (
    "--config.model.vocab_size=100"
  ),
  "data.source='nowhere'": "--config.data.source=nowhere",
  "restore_step=7: no such checkpoint; have none": (
    "--config.checkpoint.restore_step=7"
  ),
}


def test_refused_command_lines(config_file, tmp_path):
  """In one line, before any array; at first before any file, too."""
  workdir, later = tmp_path / "run", tmp_path / "later"

  def command(folder, flag):
    name, _, value = flag.partition("=")
    given = {"--config": config_file, "--workdir": folder}
    given.pop(name, None)
    words = [f"{name}={value}" for name, value in given.items()]
    return words + [flag.format(config_file=config_file)] * bool(value)

  commands = [command(workdir, flag) for flag in REFUSED.values()]
  commands += [command(later, flag) for flag in REFUSED_LATER.values()]
  results = run_many("gdn2_jax.train.__main__", commands)
  messages = [*REFUSED, *REFUSED_LATER]
  for message, result in zip(messages, results, strict=True):
    shown = result["out"] + result["err"]
    assert result["code"] == 1, (message, shown)
    assert message in shown
    assert "Traceback" not in shown
    assert result["arrays"] == 0, message
  assert not workdir.exists()
