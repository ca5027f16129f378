"""Parquet files to packed rows to a training run that is killed and resumed."""

import json
import re
import subprocess
import sys
import time

import pytest

from gdn2_jax.data import __main__
from tests.data import parquet_files
from tests.faults.child import environment
from tests.tiny_run import ROOT, run_many


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
  folder = tmp_path_factory.mktemp("end_to_end")
  parquet_files.write_folder(folder / "parquet")
  out = folder / "rows"
  argv = ["fineweb_edu", f"--local={folder / 'parquet'}", f"--out={out}"]
  assert __main__.main([*argv, "--tokenizer=bpe-300", "--workers=0"]) == 0
  return out


def _flags(rows, workdir, *more):
  changes = {
    "data.source": rows,
    "data.tokenizer": rows / "tokenizer.json",
    "data.seq_len": 32,
    "data.batch_size": 4,
    "model.vocab_size": 384,
    "model.num_layers": 1,
    "model.pattern": "G",
    "model.model_dim": 32,
    "model.mlp_dim": 32,
    "model.gdn2.num_heads": 1,
    "model.gdn2.key_dim": 16,
    "model.gdn2.value_dim": 16,
    "model.gdn2.implementation": "reference",
    "checkpoint.every_steps": 10,
    "eval.every_steps": 0,
    "log_every": 1,
    "num_steps": 100_000,
  }
  return [
    "--config=configs/tiny_cpu.py",
    f"--workdir={workdir}",
    *(f"--config.{name}={value}" for name, value in changes.items()),
    *more,
  ]


def _losses(workdir):
  path = workdir / "metrics.jsonl"
  if not path.is_file():
    return {}
  # The last line may be half written.
  lines = [json.loads(x) for x in path.read_text().split("\n")[:-1]]
  return {r["step"]: r["loss"] for r in lines if r["kind"] == "train"}


def _run_and_kill(rows, workdir, step):
  """Trains until a step is in the metrics, then SIGKILL; what it printed."""
  path = workdir.with_suffix(".log")
  with open(path, "w") as log:
    running = subprocess.Popen(
      [sys.executable, "-m", "gdn2_jax.train", *_flags(rows, workdir)],
      cwd=ROOT,
      env=environment(),
      stdout=log,
      stderr=log,
    )
  deadline = time.monotonic() + 240
  try:
    while max(_losses(workdir), default=0) < step:
      assert running.poll() is None, path.read_text()
      assert time.monotonic() < deadline
      time.sleep(0.01)
  finally:
    running.kill()
    running.wait()
  return path.read_text()


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_losses(rows, tmp_path):
  workdir = tmp_path / "run"
  _run_and_kill(rows, workdir, 25)
  before = _losses(workdir)
  # Rows after the checkpoint are dropped and made again.
  printed = _run_and_kill(rows, workdir, max(before) + 1)
  saved = re.search(r"resumed from step (\d+)", printed)
  assert saved and 10 <= int(saved[1]) < max(before), printed
  after = _losses(workdir)
  assert {step: after[step] for step in before} == before


def test_what_does_not_fit_is_refused_at_once(rows, tmp_path):
  vocabulary = "--config.model.vocab_size=256"
  cases = {
    f"{vocabulary}: the tokenizer": vocabulary,
    "data.tokenizer='bytes'": "--config.data.tokenizer=bytes",
    "data.source='no/such'": "--config.data.source=no/such",
  }
  results = run_many(
    "gdn2_jax.train.__main__",
    [_flags(rows, tmp_path / "run", change) for change in cases.values()],
  )
  for message, result in zip(cases, results, strict=True):
    assert result["code"] != 0
    assert message in result["err"]
    assert "parameters" not in result["out"]  # nothing was built
    assert not (tmp_path / "run" / "checkpoints").exists()
