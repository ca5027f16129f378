"""The command on a tiny run: rows, resume, tables, refusals."""

import json

import pytest

from gdn2_jax.eval.__main__ import COMMANDS
from tests.tiny_run import make_run, run_many, run_module


@pytest.mark.slow
def test_the_command_scores_resumes_and_refuses(tmp_path):
  assert "ruler" in COMMANDS
  workdir = make_run(tmp_path)
  essays = tmp_path / "essays.txt"
  essays.write_text("Some prose. " * 300)
  out, summary = tmp_path / "out", tmp_path / "summary.json"
  base = [f"--workdir={workdir}", "--generator=lm_eval", "--lengths=1024"]
  base += [f"--essays={essays}", "--tasks=niah_single_1", "--batch_size=2"]
  saved = [*base, f"--out={out}"]
  commands = [
    [*saved, "--samples=2"],
    [*saved, "--samples=2", f"--json={summary}"],
    [*saved, "--samples=2", "--seed=3"],
    [*base, "--lengths=128"],
    [*base, "--tasks=niah"],
    [*base, "--scores="],
    [*base, "--samples=0"],
    [*base, f"--json={tmp_path}/none/x.json"],
    [*base, f"--out={essays}"],
    [*base, "--generator=ruler", "--tasks=niah_single_2"],
  ]
  first, second, *refused = run_many("gdn2_jax.eval.ruler.__main__", commands)
  assert first["code"] == second["code"] == 0, first["err"] + second["err"]
  assert "generator=lm_eval, essays=essays.txt" in first["out"]
  assert "S-NIAH-1" in first["out"]
  assert first["out"] == second["out"]
  rows = [json.loads(x) for x in (out / "rows.jsonl").read_text().splitlines()]
  assert [row["key"] for row in rows] == [
    "niah_single_1/1024/0",
    "niah_single_1/1024/1",
  ]
  assert rows[0]["generator"] == "lm_eval" and len(rows[0]["weights"]) == 64
  assert rows[0]["value_tokens"] == 8
  content = json.loads(summary.read_text())
  (result,) = content["results"]
  assert content["model"]["name"] == str(workdir)
  assert content["model"]["step"] == 3
  assert content["model"]["weights"] == rows[0]["weights"]
  assert result["samples"] == 2
  gains = [row["gain"] for row in rows]
  assert abs(result["gain"]["mean"] - sum(gains) / 2) < 1e-12
  messages = [
    "was begun with seed=42, now seed=3",
    "--lengths=128: expected whole numbers above 128",
    "--tasks=niah: expected some of niah_single_1",
    "--scores=: expected some of",
    "--samples=0: expected >= 1",
    "its folder does not exist",
    "a file, expected a folder",
    "length=1024: niah_single_2 does not fit",
  ]
  for got, message in zip(refused, messages, strict=True):
    assert got["code"] == 1 and message in got["err"], got
    assert got["err"].count("\n") == 1


@pytest.mark.slow
def test_help_lists_the_flags_of_the_command():
  help_text = run_module("gdn2_jax.eval", "ruler", "--help").stdout
  for flag in ("generator", "essays", "out", "workdir", "model", "step"):
    assert f"--{flag}: " in help_text
