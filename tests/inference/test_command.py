"""`python -m gdn2_jax.generate`: output, sessions, refusals."""

import pathlib
import re

import jax
import numpy as np
import pytest

from gdn2_jax.inference.files.session import Session, load_session, save_session
from gdn2_jax.inference.identity import identify
from gdn2_jax.inference.state import init_state, prefill
from gdn2_jax.interop.folder import save_model
from gdn2_jax.train.checkpoint import load_run
from tests.inference.conftest import damage_params, damage_state
from tests.tiny_run import make_run, run_many, run_module

pytestmark = pytest.mark.slow

MODULE = "gdn2_jax.inference.__main__"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return make_run(tmp_path_factory.mktemp("generate"))


@pytest.fixture(scope="module")
def run(workdir):
  return load_run(workdir)


@pytest.fixture(scope="module")
def published(run, tmp_path_factory):
  """The model of the workdir as a published folder."""
  folder = tmp_path_factory.mktemp("published") / "model"
  save_model(folder, run.params, run.config.model, run.tokenizer)
  return folder


@pytest.fixture(scope="module")
def belongs(run):
  return identify(run.params, run.config.model, run.tokenizer)


@pytest.fixture(scope="module")
def talks(tmp_path_factory) -> pathlib.Path:
  """Folder of the sessions."""
  return tmp_path_factory.mktemp("talks")


@pytest.fixture(scope="module")
def good_calls(workdir, run, published, belongs, talks):
  """Command lines that succeed, by name."""
  ended = Session(
    state=init_state(run.config.model, 1),
    pending=None,
    draws=5,
    seed=0,
    tail=(0xE2, 0x82),  # two of three bytes
  )
  save_session(talks / "ended", ended, belongs)
  source = f"--workdir={workdir}"

  def call(tokens, *more, source=source):
    return [source, f"--max_new_tokens={tokens}", *more]

  def talk(file, tokens, *more, source=source):
    return call(tokens, f"--session={talks / file}", *more, source=source)

  prompt, greedy = "--prompt=de f", "--greedy"
  return {
    "seed 1": call(12, prompt, "--seed=1"),
    "seed 1 again": call(12, prompt, "--seed=1"),
    "seed 2": call(12, prompt, "--seed=2"),
    "greedy": call(12, prompt, greedy, "--seed=1"),
    "cold": call(12, prompt, "--temperature=0", "--seed=2", "--step=3"),
    "short": call(3, prompt, greedy),
    "long": talk("long", 24, prompt, greedy),
    "part 1": talk("parts", 11, prompt, greedy),
    "part 2": talk("parts", 1, greedy),
    "part 3": talk("parts", 12, greedy, source=f"--model={published}"),
    "drawn": talk("drawn", 24, prompt, "--seed=7"),
    "drawn 1": talk("drawn_parts", 9, prompt, "--seed=7"),
    "drawn 2": talk("drawn_parts", 15),
    "more": talk("parts", 5, "--prompt= x = ", greedy),
    "ended": talk("ended", 3, "--prompt=x", greedy),
    "help": ["--help"],
  }


@pytest.fixture(scope="module")
def refused(workdir, run, published, belongs, tmp_path_factory):
  """A folder of sessions and models, and refused command lines by message."""
  folder = tmp_path_factory.mktemp("refused")
  (folder / "empty").mkdir()
  model, other = run.config.model, folder / "other"
  params = jax.tree.map(lambda x: x * 2, run.params)
  save_model(other, params, model, run.tokenizer)
  save_model(folder / "mute", params, model)
  (folder / "text").write_text("no session at all")
  save_session(
    folder / "talk",
    Session(state=init_state(model, 1), pending=None, draws=0, seed=0),
    belongs,
  )
  ok = [f"--workdir={workdir}", "--prompt=x"]
  talk = f"--session={folder / 'talk'}"
  return folder, {
    "--workdir is missing": ["--prompt=x"],
    "no such directory": [f"--workdir={folder}/none", "--prompt=x"],
    "no complete checkpoint": [f"--workdir={folder}/empty", "--prompt=x"],
    "--prompt is missing": [f"--workdir={workdir}"],
    "--prompt is missing or empty": [f"--workdir={workdir}", "--prompt="],
    "--step=7: no such checkpoint; have 3": [*ok, "--step=7"],
    "--max_new_tokens=0": [*ok, "--max_new_tokens=0"],
    "temperature: expected 0": [*ok, "--temperature=-1"],
    "top_p: expected": [*ok, "--top_p=1.5"],
    "top_k: expected": [*ok, "--top_k=-2"],
    "top_k: expected at most the vocabulary size 259": [*ok, "--top_k=300"],
    "--seed=-1": [*ok, "--seed=-1"],
    "expected one of them, got both": [*ok, f"--model={published}"],
    "--step=3: only a --workdir": [f"--model={published}", "--step=3", ok[1]],
    "none: no such folder": [f"--model={folder / 'none'}", ok[1]],
    "not a folder with a published model": [f"--model={workdir}", ok[1]],
    "has no tokenizer.json": [f"--model={folder / 'mute'}", ok[1]],
    "a new conversation needs --prompt": [ok[0], f"{talk}x"],
    "expected a file": [*ok, f"--session={folder}"],
    "no such folder": [*ok, f"--session={folder / 'no' / 'talk'}"],
    "not a safetensors file": [*ok, f"--session={folder / 'text'}"],
    "talk: weights: the file has '": [f"--model={other}", ok[1], talk],
    "its text has ended; give a --prompt": [ok[0], talk],
    "top_k: expected at most the vocabulary": [*ok, talk, "--top_k=300"],
    "promt": [ok[0], "--promt=x"],
    "unexpected argument 'Return'": [ok[0], "Return", "the"],
  }


@pytest.fixture(scope="module")
def spoilt(published, run, belongs, tmp_path_factory):
  """A folder, and command lines with NaN: (argv, text, index, cause)."""
  folder = tmp_path_factory.mktemp("spoilt")
  config, tokenizer, ids = run.config.model, run.tokenizer, list(b"de f")
  logits, _ = prefill(
    run.params, np.array([ids]), np.array([4]), init_state(config, 1)
  )
  first = int(logits[0, : tokenizer.vocab_size].argmax())
  assert first not in [*ids, tokenizer.eos_id]
  for name, params in {
    "norm": damage_params(run.params, "final_norm/weight"),
    "word": damage_params(run.params, "embedding/table", first),
  }.items():
    save_model(folder / name, params, config, tokenizer)
  state = damage_state(init_state(config, 1), 0)
  talk = Session(state=state, pending=None, draws=5, seed=0)
  save_session(folder / "talk", talk, belongs)

  def call(model, *more):
    return [f"--model={model}", "--prompt=de f", "--max_new_tokens=9", *more]

  new, talk = (f"--session={folder / name}" for name in ("new", "talk"))
  norm = "params: NaN or infinity in final_norm/weight"
  word = "params: NaN or infinity in embedding/table"
  row = "state: NaN or infinity in this row, none in params"
  return folder, [
    (call(folder / "norm"), "", 0, norm),
    (call(folder / "norm", new, "--greedy"), "", 0, norm),
    (call(folder / "word", "--greedy"), tokenizer.decode([first]), 1, word),
    (call(published, talk), "", 5, row),
  ]


@pytest.fixture(scope="module")
def results(good_calls, refused, spoilt):
  """Results of all these command lines, in one process: good, refused, spoilt.

  With what the folder of refused calls and the session with NaN were before.
  """
  groups = [
    list(good_calls.values()),
    list(refused[1].values()),
    [argv for argv, *_ in spoilt[1]],
  ]
  before = times_of(refused[0]), (spoilt[0] / "talk").read_bytes()
  done = iter(run_many(MODULE, [argv for group in groups for argv in group]))
  return *([next(done) for _ in group] for group in groups), before


def times_of(folder):
  return {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}


@pytest.fixture(scope="module")
def done(good_calls, results):
  """Results of the calls that succeed, by name."""
  done = dict(zip(good_calls, results[0], strict=True))
  shown = done.pop("help")
  assert {got["code"] for got in done.values()} == {0}, done
  return {**done, "help": shown}


def test_text_goes_to_stdout_and_speed_to_stderr(workdir):
  flags = ["--prompt=Return", "--max_new_tokens=30"]
  done = run_module("gdn2_jax.generate", f"--workdir={workdir}", *flags)
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


def test_seeds_repeat_and_greedy_needs_none(done):
  text = {name: got["out"] for name, got in done.items()}
  assert text["seed 1"] == text["seed 1 again"] != text["seed 2"]
  assert text["greedy"] == text["cold"]
  short = done["short"]
  assert "3 tokens]" in short["err"] and "/s" not in short["err"]
  # Three bytes may end inside a character; the first two never change again.
  assert text["greedy"].startswith(short["out"].rstrip("\n\ufffd"))


def test_a_session_goes_on_where_it_stopped(done, talks, belongs):
  # A line ends each call, not the text.
  text = {name: got["out"].removesuffix("\n") for name, got in done.items()}
  assert text["long"] == text["part 1"] + text["part 2"] + text["part 3"]
  assert text["long"].startswith(text["greedy"].rstrip("\ufffd"))
  assert text["drawn"] == text["drawn 1"] + text["drawn 2"] != text["long"]
  drawn, parts = talks / "drawn", talks / "drawn_parts"
  assert drawn.read_bytes() == parts.read_bytes()
  assert load_session(drawn, belongs).seed == 7
  # Four bytes are read; of the 24 that were chosen all but the last.
  session = load_session(talks / "long", belongs)
  assert session.state.position.tolist() == [4 + 24 - 1]
  assert session.tail[-1] == session.pending
  assert (session.draws, session.seed) == (24, 0)
  assert "[model, 0 prompt tokens" in done["part 3"]["err"]


def test_a_session_takes_more_text(done, talks, belongs):
  assert done["more"]["out"].lstrip("\ufffd").startswith(" x = ")
  assert f"parts: {4 + 24 + 5 + 5} tokens so far]" in done["more"]["err"]
  session = load_session(talks / "parts", belongs)
  assert session.state.position.tolist() == [4 + 24 + 5 + 5 - 1]
  assert session.tail[:-5][-5:] == tuple(b" x = ")
  # A character that stays unfinished, and the prompt; the document had ended.
  assert done["ended"]["out"].startswith("\ufffdx")
  assert "ended: 4 tokens so far]" in done["ended"]["err"]
  assert load_session(talks / "ended", belongs).draws == 5 + 3


def test_help_teaches_by_example(done):
  for taught in ("--prompt=", "--top_p=0.9", "--session=talk.", "--model="):
    assert taught in done["help"]["out"]


def test_refusals_are_one_line_and_exit_with_one(refused, results):
  folder, calls = refused
  _, results, _, (before, _) = results
  *done, unknown, words = results
  for message, got in zip(calls, done, strict=False):
    assert got["code"] == 1, (message, got)
    assert got["err"].startswith("error: ") and message in got["err"], got
    assert got["err"].count("\n") == 1 and got["out"] == "", got
  # No file is written, and no existing one changes.
  assert times_of(folder) == before

  assert unknown["code"] == 1 and "promt" in unknown["err"]
  assert words["code"] == 1
  assert "unexpected argument 'Return'" in words["err"] + words["out"]
  assert "Traceback" not in unknown["err"] + words["err"]


def test_logits_that_are_not_finite_are_an_error(spoilt, results):
  """After the text so far, and a session stays as it was."""
  folder, cases = spoilt
  _, _, done, (_, before) = results
  for (_, text, index, cause), got in zip(cases, done, strict=True):
    assert (got["code"], got["out"]) == (1, f"de f{text}\n"), got
    assert got["err"].startswith("error: prompts[0]: non-finite logits"), got
    assert f"at index {index} of the chosen tokens: " in got["err"]
    assert cause in got["err"] and got["err"].count("\n") == 1, got
  assert (folder / "talk").read_bytes() == before
  assert not (folder / "new").exists()
