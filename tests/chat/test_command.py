"""`gdn2 chat` as a process: scripts, sessions, kill -9, refusals."""

import re
import subprocess
import sys

import pytest

from gdn2_jax.chat.talk import Talk
from gdn2_jax.inference.files.session import load_session
from gdn2_jax.inference.identity import identify
from gdn2_jax.inference.sampling import GREEDY
from gdn2_jax.interop.folder import Model
from gdn2_jax.train.checkpoint import load_run
from tests.faults.child import environment
from tests.tiny_run import ROOT, make_run, run_module

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return make_run(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def model(workdir):
  run = load_run(workdir)
  return Model(run.config.model, run.params, run.tokenizer)


def start(cache, *argv):
  return subprocess.Popen(
    [sys.executable, "-m", "gdn2_jax.chat", *argv],
    cwd=ROOT,
    env=environment() | {"XDG_CACHE_HOME": str(cache)},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    encoding="utf-8",
  )


def read_until(stream, pattern):
  lines = []
  for line in stream:
    lines.append(line)
    if re.search(pattern, line):
      return
  raise AssertionError(f"no {pattern!r} in {lines}")


def say(process, line):
  process.stdin.write(line + "\n")
  process.stdin.flush()


def test_after_kill_9_the_last_complete_answer_is_there(
  workdir, model, tmp_path
):
  file, cache = tmp_path / "talk", tmp_path / "cache"
  flags = [f"--workdir={workdir}", f"--session={file}", "--greedy"]
  flags.append("--max_new_tokens=12")
  killed = start(cache, *flags)
  say(killed, "de f")
  read_until(killed.stderr, r"^\[12 tokens")
  say(killed, "/set max_new_tokens=100000000")
  say(killed, "x = ")
  read_until(killed.stdout, "^max_new_tokens=")
  assert killed.stdout.read(1)  # it is in the middle of the second answer
  killed.kill()
  killed.communicate()
  belongs = identify(model.params, model.config, model.tokenizer)
  assert load_session(file, belongs).draws == 12

  programs = {path.name for path in (cache / "gdn2_jax" / "jax").iterdir()}
  again = start(cache, *flags)
  out, err = again.communicate("x = \n/state\n/stat\n", timeout=300)
  assert again.returncode == 1 and "did you mean state?" in err
  # What is compiled was there already.
  files = {path.name for path in (cache / "gdn2_jax" / "jax").iterdir()}
  assert {name for name in programs ^ files if name.endswith("-cache")} == set()
  talk = Talk(model, sampler=GREEDY, max_new_tokens=12)
  for line in ("de f", "x = "):
    turn = talk.answer(talk.encode(line), lambda _: False)
  session = load_session(file, belongs)
  assert session.tail[-12:] == tuple(turn.tokens)
  assert f"read       {talk.tokens_read} tokens" in out


def test_refusals_at_the_start_are_one_line(workdir, tmp_path):
  (tmp_path / "text").write_text("no session")
  for message, argv in {
    "--workdir is missing": [],
    "not a safetensors file": [
      f"--workdir={workdir}",
      f"--session={tmp_path / 'text'}",
    ],
    "--room=3: expected >= 16": [f"--workdir={workdir}", "--room=3"],
  }.items():
    done = run_module("gdn2_jax.chat", *argv)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1
  done = run_module("gdn2_jax", "chat", "--help")
  assert done.returncode == 0
  for taught in ("no chat template", "--session", "--temperature", "--room"):
    assert taught in done.stdout
