"""`python -m gdn2_jax.generate`: what it prints, and how it refuses."""

import re

import pytest

from tests.tiny_run import make_run, run_many, run_module

MODULE = "gdn2_jax.generate"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return make_run(tmp_path_factory.mktemp("generate"))


def test_text_goes_to_stdout_and_speed_to_stderr(workdir):
  done = run_module(
    MODULE, f"--workdir={workdir}", "--prompt=Return", "--max_new_tokens=30"
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith("Return")
  # Bytes of random weights: 30 of them are 30 characters at most.
  assert len("Return") < len(done.stdout.rstrip("\n")) <= len("Return") + 30
  assert re.search(
    r"\[step 3, 6 prompt tokens, first token after \d+\.\d\d s with "
    r"compilation, then \d+\.\d tokens/s, 30 tokens\]",
    done.stderr,
  )
  assert "Traceback" not in done.stderr


def test_seeds_repeat_and_greedy_needs_none(workdir):
  base = [f"--workdir={workdir}", "--prompt=de f", "--max_new_tokens=12"]
  runs = run_many(
    MODULE,
    [
      [*base, "--seed=1"],
      [*base, "--seed=1"],
      [*base, "--seed=2"],
      [*base, "--greedy", "--seed=1"],
      [*base, "--temperature=0", "--seed=2", "--step=3"],
      [*base, "--max_new_tokens=3", "--greedy"],
    ],
  )
  assert [run["code"] for run in runs] == [0] * 6, runs
  text = [run["out"] for run in runs]
  assert text[0] == text[1] != text[2]
  assert text[3] == text[4]
  assert "3 tokens]" in runs[5]["err"] and "/s" not in runs[5]["err"]
  # Three bytes may end inside a character; the first two never change again.
  assert text[3].startswith(text[5].rstrip("\n\ufffd"))


def test_refusals_are_one_line_and_exit_with_one(workdir, tmp_path):
  (tmp_path / "empty").mkdir()
  ok = [f"--workdir={workdir}", "--prompt=x"]
  cases = [
    (["--prompt=x"], "--workdir is missing"),
    ([f"--workdir={tmp_path}/none", "--prompt=x"], "no such directory"),
    ([f"--workdir={tmp_path}/empty", "--prompt=x"], "no complete checkpoint"),
    ([f"--workdir={workdir}"], "--prompt is missing"),
    ([f"--workdir={workdir}", "--prompt="], "--prompt is missing or empty"),
    ([*ok, "--step=7"], "--step=7: no such checkpoint; have 3"),
    ([*ok, "--max_new_tokens=0"], "--max_new_tokens=0"),
    ([*ok, "--temperature=-1"], "temperature: expected 0"),
    ([*ok, "--top_p=1.5"], "top_p: expected"),
    ([*ok, "--top_k=-2"], "top_k: expected"),
    ([*ok, "--top_k=300"], "top_k: expected at most the vocabulary size 259"),
    ([*ok, "--seed=-1"], "--seed=-1"),
  ]
  done = run_many(MODULE, [argv for argv, _ in cases])
  for (argv, message), got in zip(cases, done, strict=True):
    assert got["code"] == 1, (argv, got)
    assert got["err"].startswith("error: ") and message in got["err"], got
    assert got["err"].count("\n") == 1 and got["out"] == "", got


def test_misspelt_flags_and_positional_words_are_refused(workdir):
  unknown, positional, shown = run_many(
    MODULE,
    [
      [f"--workdir={workdir}", "--promt=x"],
      [f"--workdir={workdir}", "Return", "the"],
      ["--help"],
    ],
  )
  assert unknown["code"] == 1 and "promt" in unknown["err"]
  assert positional["code"] == 1
  assert "unexpected argument 'Return'" in (
    positional["err"] + positional["out"]
  )
  assert "Traceback" not in unknown["err"] + positional["err"]
  assert "--prompt=" in shown["out"] and "--top_p=0.9" in shown["out"]
