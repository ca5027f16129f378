"""`python -m gdn2_jax.eval`: table, file, refusals."""

import json
import math

import numpy as np
import pytest

from gdn2_jax.data.pipeline import open_dataset
from gdn2_jax.eval.loss.ngram import ngram_baselines
from gdn2_jax.eval.loss.perplexity import evaluate_loss
from gdn2_jax.train.checkpoint import load_run
from tests.tiny_run import make_run, run_many, run_module

pytestmark = pytest.mark.slow

MODULE = "gdn2_jax.eval"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return make_run(tmp_path_factory.mktemp("eval"))


def test_table_and_file_hold_what_the_library_computes(workdir, tmp_path):
  path = tmp_path / "eval.json"
  done = run_module(MODULE, f"--workdir={workdir}", f"--json={path}")
  assert done.returncode == 0, done.stderr
  saved = json.loads(path.read_text())
  assert saved["step"] == 3
  names = [row["name"] for row in saved["results"]]
  assert names == [
    "model 1x (32)",
    "model 2x (64)",
    "unigram",
    "bigram (Kneser-Ney)",
  ]
  assert [p.name for p in tmp_path.iterdir()] == ["eval.json"]

  run = load_run(workdir)
  dataset = open_dataset(run.config.data)
  want = [
    evaluate_loss(
      run.config.model,
      run.params,
      dataset,
      seq_len=length,
      batch_size=8,
      tokens=2 * 4 * 32,
    )
    for length in (32, 64)
  ] + ngram_baselines(dataset, seq_len=32, rows=8)
  table = done.stdout.splitlines()
  for row, report in zip(saved["results"], want, strict=True):
    assert row["tokens"] == report.tokens
    np.testing.assert_allclose(
      row["nats_per_token"], report.nats_per_token, rtol=2e-6
    )
    # In the table, to its four digits.
    line = next(x for x in table if x.startswith(row["name"]))
    assert f"{row['nats_per_token']:.4f}" in line
    assert f"{row['bits_per_byte']:.4f}" in line
  # Random weights know next to nothing; counting bytes knows more.
  model, unigram = saved["results"][0], saved["results"][2]
  assert abs(model["nats_per_token"] - math.log(259)) < 0.5
  assert unigram["nats_per_token"] < model["nats_per_token"] - 1
  assert "model 2x (64) by position in the document" in done.stdout
  assert "32-63" in done.stdout


@pytest.mark.slow
def test_lengths_batches_and_refusals(workdir, tmp_path):
  ok = f"--workdir={workdir}"
  refused = [
    ([], "--workdir is missing"),
    ([f"--workdir={tmp_path}/none"], "no such directory"),
    ([ok, "--step=7"], "--step=7: no such checkpoint; have 3"),
    ([ok, "--lengths=1,x"], "--lengths=1,x: expected whole numbers >= 1"),
    ([ok, "--lengths=0"], "--lengths=0: expected"),
    ([ok, "--lengths="], "--lengths=: expected"),
    ([ok, "--batches=-1"], "--batches=-1: expected >= 0"),
    ([ok, "--batch_size=0"], "--batch_size=0: expected >= 1"),
    ([ok, f"--json={tmp_path}/none/x.json"], "its folder does not exist"),
  ]
  accepted = [ok, "--lengths=3", "--batches=1", "--batch_size=2"]
  commands = [argv for argv, _ in refused] + [accepted, [ok, "junk"]]
  *done, fine, junk = run_many(f"{MODULE}.loss.__main__", commands)
  for (argv, message), got in zip(refused, done, strict=True):
    assert got["code"] == 1, (argv, got)
    assert got["err"].startswith("error: ") and message in got["err"], got
    assert got["err"].count("\n") == 1 and got["out"] == "", got
  assert fine["code"] == 0, fine
  assert "model 3x (96)" in fine["out"] and "model 1x" not in fine["out"]
  assert junk["code"] == 1
  assert "unexpected argument 'junk'" in junk["err"] + junk["out"]
