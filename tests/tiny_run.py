"""A workdir as a training run leaves it, without the training."""

import contextlib
import io
import json
import pathlib
import subprocess
import sys
import time
import traceback

import jax
import jax.numpy as jnp

from gdn2_jax.data.pipeline import DataConfig, open_dataset
from gdn2_jax.eval.loss.perplexity import EvalConfig
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.lm import LM
from gdn2_jax.model.mixers.gdn2 import GDN2Config
from gdn2_jax.sharding import MeshConfig, make_mesh, use_mesh
from gdn2_jax.train.checkpoint.manager import Checkpointer
from gdn2_jax.train.checkpoint.meta import make_meta
from gdn2_jax.train.config import TrainConfig
from gdn2_jax.train.state import TrainState, plan_state
from tests.faults.child import environment
from tests.random_params import random_params

ROOT = pathlib.Path(__file__).parents[1]


def make_run(folder: pathlib.Path, step: int = 3) -> pathlib.Path:
  """Saves random parameters of a byte-level model; returns the workdir."""
  workdir = folder / "run"
  config = TrainConfig(
    model=ModelConfig(
      vocab_size=259,
      model_dim=16,
      num_layers=1,
      pattern="G",
      gdn2=GDN2Config(
        num_heads=1, key_dim=16, value_dim=16, implementation="reference"
      ),
      mlp_dim=24,
      dtype="float32",
    ),
    data=DataConfig(
      source="snapshot",
      tokenizer="bytes",
      seq_len=32,
      batch_size=4,
      cache_dir=str(folder / "cache"),
    ),
    eval=EvalConfig(batches=2, batch_size=4, length_multiples=(1, 2)),
    num_steps=10,
  )
  dataset = open_dataset(config.data)
  workdir.mkdir()
  dataset.tokenizer.save(workdir / "tokenizer.json")
  params = random_params(config.model)
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  with use_mesh(mesh):
    plan = plan_state(
      LM(config.model), config.optimizer, config.num_steps, mesh
    )
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(
      step=zero + step,
      params=params,
      opt_state=plan.optimizer.init(params),
      skipped=zero,
      skipped_in_a_row=zero,
    )
    saver = Checkpointer(workdir / "checkpoints", config.checkpoint)
    meta = make_meta(config, dataset.fingerprint, {}, state)
    saver.save(step, state, meta)
    saver.close()
  return workdir


def run_module(module: str, *argv: str) -> subprocess.CompletedProcess:
  """`python -m module argv...` on one CPU device."""
  return subprocess.run(
    [sys.executable, "-m", module, *argv],
    cwd=ROOT,
    env=environment() | {"COLUMNS": "80"},
    capture_output=True,
    text=True,
    encoding="utf-8",
    timeout=600,
    check=False,
  )


def run_many(module: str, commands: list[list[str]]) -> list[dict]:
  """Several command lines, one after the other in one new process.

  Returns:
    For each a dict of "code", "out", "err", "seconds" it took, and "arrays" on
    devices afterwards.
  """
  done = run_module("tests.tiny_run", module, json.dumps(commands))
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


def _main(module: str, commands: str) -> None:
  import importlib

  from absl import app
  from absl.testing import flagsaver

  from gdn2_jax import cli

  entry = importlib.import_module(module)
  app.define_help_flags()  # here, or the first flagsaver would remove them
  results = []
  for argv in json.loads(commands):
    out, err, code = io.StringIO(), io.StringIO(), 0
    start = time.process_time()
    with (
      contextlib.redirect_stdout(out),
      contextlib.redirect_stderr(err),
      flagsaver.flagsaver(),
    ):
      try:
        sys.argv = [module, *argv]
        cli.run(entry.main, entry.__doc__)
      except SystemExit as e:
        code = e.code or 0
      except Exception:
        traceback.print_exc()
        code = -1
    results.append(
      {
        "code": code,
        "out": out.getvalue(),
        "err": err.getvalue(),
        "seconds": time.process_time() - start,
        "arrays": len(jax.live_arrays()),
      }
    )
  print(json.dumps(results))


if __name__ == "__main__":
  _main(*sys.argv[1:])
