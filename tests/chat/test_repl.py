"""Answers, undo, branches, files and refusals of `gdn2 chat`."""

import copy
import dataclasses
import io
import re
import signal

import jax
import pytest

from gdn2_jax.chat.lines import read_script, read_terminal
from gdn2_jax.chat.talk import MAX_UNDO
from gdn2_jax.inference.files.session import load_session
from gdn2_jax.inference.generate import generate
from gdn2_jax.inference.identity import identify
from gdn2_jax.inference.text import TextStream
from tests.chat.models import SAMPLER, Chat, make_model
from tests.inference.conftest import damage_params
from tests.inference.states import assert_equal


@pytest.fixture(scope="module")
def belongs():
  model = make_model()
  return identify(model.params, model.config, model.tokenizer)


def generated(prompts, counts, seed=0):
  """Tokens of `generate` for texts of one conversation, one list each."""
  model = make_model()
  tokens, state, index, pending = [], None, 0, []
  for prompt, count in zip(prompts, counts, strict=True):
    result = generate(
      model.params,
      model.config,
      [pending + list(prompt.encode())],
      count,
      rng=jax.random.key(seed),
      sampler=dataclasses.replace(
        SAMPLER, vocab_size=model.tokenizer.vocab_size
      ),
      stop_ids=[model.tokenizer.eos_id],
      state=state,
      index=index,
      return_state=True,
    )
    tokens += result.tokens
    state, index, pending = result.state, result.index[0], result.pending
  return tokens, state


def text_of(tokens):
  """As printed: a character that is not finished is held back."""
  text = TextStream(make_model().tokenizer.decode)
  return "".join(text.push(token) for token in tokens)


def test_the_tokens_are_those_of_generate():
  """Two lines, and an empty one that goes on without more text."""
  chat = Chat(seed=7)
  printed = chat.say("de f", "x = ", "")
  lists, state = generated(["de f", "x = ", ""], [12, 12, 12], seed=7)
  assert all(lists) and chat.repl.errors == 0
  assert_equal(chat.session.state, state)
  assert chat.session.pending == lists[2][-1]
  # Without prompts: what a script reads. The third goes on mid-character.
  lines = [text_of(tokens) + "\n" for tokens in lists[:2]]
  assert printed.startswith("".join(lines))
  assert chat.session.tail[-12:] == tuple(lists[2])
  status = r"\[12 tokens, \d+\.\d tokens/s; state 1,604 bytes\]\n"
  assert re.fullmatch(f"({status}){{3}}", chat.err.getvalue())


def test_long_texts_are_read_in_chunks():
  """600 tokens: one chunk of 512, the rest by 16; equal up to rounding."""
  text = "abc " * 150
  chat = Chat(max_new_tokens=1)
  chat.say(text)
  _, state = generated([text], [1])
  assert chat.talk.tokens_read == 600
  for got, want in zip(
    jax.tree.leaves(chat.session.state), jax.tree.leaves(state), strict=True
  ):
    assert abs(got - want).max() < 1e-5


def test_undo_restores_every_bit():
  chat = Chat()
  first = chat.say("de f")
  before, bits = chat.session, jax.device_get(chat.session.state)
  second = chat.say("one")
  chat.say("two", "/undo", "/undo")
  assert chat.session is before
  assert_equal(chat.session.state, bits)
  assert chat.say("one") == second
  chat.say("/undo", "/undo")
  assert chat.talk.tokens_read == 0 and chat.say("de f") == first
  chat.say("/undo")
  assert "no turn left to undo" in chat.refuse("/undo")
  for _ in range(MAX_UNDO + 3):
    chat.talk.replace(before)
  assert len(chat.talk.branch.past) == MAX_UNDO


def test_branches_are_independent():
  chat = Chat()
  chat.say("de f", "/fork b")
  here = chat.say("one")
  there = jax.device_get(chat.session.state)
  assert "branch b, 15 tokens read" in chat.say("/switch b")
  assert chat.say("one") == here
  assert_equal(chat.session.state, there)
  chat.say("two", "/undo", "/undo", "/undo")  # also what was before the fork
  assert chat.talk.tokens_read == 0
  chat.say("/switch main")
  assert_equal(chat.session.state, there)
  assert "main" in chat.refuse("/switch mian")
  assert "b: exists already" in chat.refuse("/fork b")


def test_a_saved_conversation_goes_on_elsewhere(tmp_path, belongs):
  file = tmp_path / "a talk"
  chat = Chat(seed=3)
  chat.say("de f", f"/save {file}")
  kept, answer = chat.session, chat.say("one")
  other = Chat()
  other.say("two")
  assert "15 tokens read" in other.say(f"/load {file}")
  assert_equal(other.session.state, kept.state)
  assert other.session.seed == 3
  assert other.say("one") == answer
  other.say("/undo", "/undo")
  assert other.talk.tokens_read == len("two") + 12 - 1
  # A file of this model may be replaced, any other file not.
  other.say(f"/save {file}")
  assert load_session(file, belongs).draws == 12
  (tmp_path / "notes").write_text("mine")
  assert "not a safetensors" in other.refuse(f"/save {tmp_path / 'notes'}")
  assert (tmp_path / "notes").read_text() == "mine"


def test_the_session_file_follows_the_conversation(tmp_path, belongs):
  file = str(tmp_path / "talk")
  chat = Chat(file=file)
  for line in ("de f", "one", "/undo", "/fork b", "/set seed=9", "/switch b"):
    chat.say(line)
    kept = load_session(file, belongs)
    assert_equal(kept.state, chat.session.state)
    assert dataclasses.replace(kept, state=None) == dataclasses.replace(
      chat.session, state=None
    )
  chat.say("/undo")  # back to nothing, which is a session too
  assert load_session(file, belongs).pending is None
  again = Chat(session=load_session(file, belongs))
  assert again.say("de f") == chat.say("de f")


def test_a_session_of_another_model_is_refused(tmp_path):
  chat, file = Chat(), tmp_path / "talk"
  chat.say("de f", f"/save {file}")
  model = make_model()
  params = jax.tree.map(lambda x: x * 2, model.params)
  other = Chat(dataclasses.replace(model, params=params))
  before, data = other.session, file.read_bytes()
  for command in ("load", "save"):
    error = other.refuse(f"/{command} {file}")
    assert "talk: weights: the file has '" in error
  assert other.session is before and file.read_bytes() == data


class Interrupted(io.StringIO):
  """A stream whose reader presses Ctrl-C at the first text."""

  armed = True

  def write(self, text):
    if self.armed and text:
      self.armed = False
      signal.raise_signal(signal.SIGINT)
    return super().write(text)


def test_ctrl_c_ends_an_answer_and_no_token_is_lost(tmp_path, belongs):
  before = signal.getsignal(signal.SIGINT)
  file = str(tmp_path / "talk")
  whole, _ = generated(["de f"], [12])
  chat = Chat(out=Interrupted(), file=file)
  chat.say("de f")
  assert 1 <= chat.session.draws < 12
  assert load_session(file, belongs).draws == chat.session.draws
  chat.say(f"/set max_new_tokens={12 - chat.session.draws}", "")
  assert chat.session.tail[-12:] == tuple(whole[0])
  assert signal.getsignal(signal.SIGINT) is before


def test_the_end_of_a_document():
  """It is no part of the text, which continues with more text only."""
  (tokens,), _ = generated(["de f"], [12])
  model = make_model()
  tokenizer = copy.copy(model.tokenizer)
  object.__setattr__(tokenizer, "eos_id", tokens[5])  # it is frozen
  count = tokens.index(tokens[5])
  chat = Chat(dataclasses.replace(model, tokenizer=tokenizer))
  assert chat.say("de f").rstrip("\n\ufffd") == text_of(tokens[:count])
  assert f"[{count} tokens, end of the document; " in chat.err.getvalue()
  assert chat.session.pending is None
  assert "has ended; write something" in chat.refuse("")
  chat.say("x")
  assert chat.talk.tokens_read >= 4 + count + 1


def test_logits_that_are_not_finite_leave_the_conversation(tmp_path):
  model = make_model()
  params = damage_params(model.params, "final_norm/weight")
  file = tmp_path / "talk"
  chat = Chat(dataclasses.replace(model, params=params), file=str(file))
  before = chat.session
  assert chat.say("de f") == "\n"
  error = chat.err.getvalue()
  assert chat.repl.errors == 1 and error.count("\n") == 1
  assert "non-finite logits at index 0" in error
  assert "NaN or infinity in final_norm/weight" in error
  assert error.endswith("the conversation is as before\n")
  assert chat.session is before and not file.exists()


def test_lines_join_and_slashes_are_escaped():
  script = ["a\\\n", "  b\r\n", "\n", "c\n", "d\\"]
  texts = list(read_script(script))
  assert texts == ["a\n  b", "", "c", "d"]
  chat = Chat()
  chat.say(texts[0])
  (tokens,), _ = generated(["a\n  b"], [12])
  assert chat.session.tail[-12:] == tuple(tokens)
  slash = Chat()
  slash.say("//x")
  (tokens,), _ = generated(["/x"], [12])
  assert slash.session.tail[-12:] == tuple(tokens)


def test_ctrl_c_drops_the_lines_typed_so_far(monkeypatch):
  typed = iter(["a\\", "b", "c\\", KeyboardInterrupt, "d", "e\\", EOFError])
  prompts = []

  def answer(prompt):
    prompts.append(prompt)
    line = next(typed)
    if isinstance(line, str):
      return line
    raise line

  monkeypatch.setattr("builtins.input", answer)
  assert list(read_terminal()) == ["a\nb", "d"]
  assert prompts == ["> ", "  ", "> ", "  ", "> ", "> ", "  "]


def test_commands_without_an_answer():
  chat = Chat()
  assert "after any number of tokens" in chat.say("/state")
  assert "//text" in chat.say("/help")
  settings = chat.say("/set temperature=0.5 top_k=7")
  assert settings.startswith("temperature=0.5\ntop_k=7\ntop_p=0.95\nseed=0\n")
  chat.say("/set top_p=1 seed=5")
  assert (chat.talk.sampler.top_p, chat.session.seed) == (1.0, 5)
  assert chat.say("/quit", "never read") == "" and chat.repl.errors == 0


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("", "the text so far is empty"),
    ("/stat", "/stat: no such command; did you mean state?"),
    ("/", "no such command; one of undo, fork"),
    ("/xyzzy 1", "/xyzzy: no such command; one of undo, fork"),
    ("/undo 2", "/undo: expected nothing after it, got '2'"),
    ("/fork", "/fork: expected a name, got ''"),
    ("/fork a b", "/fork: expected a name, got 'a b'"),
    ("/set temprature=1", "did you mean temperature?"),
    ("/set temperature=hot", "temperature=hot: expected a number"),
    ("/set temperature=-1", "temperature: expected 0 (greedy) or"),
    ("/set top_k=1000", "at most the vocabulary size"),
    ("/set top_k=1.5", "top_k=1.5: expected an integer"),
    ("/set max_new_tokens=0", "max_new_tokens=0: expected >= 1"),
    ("/set seed=5 top_p=0.5 top_k=-1", "top_k: expected an integer >= 0"),
    ("/set seed=-1", "seed=-1: expected 0 to 2**32 - 1"),
    ("/load", "/load: expected a file"),
    ("/load .", ".: not a regular file"),
    ("/save .", "/save .: expected a file"),
    ("/load none", "none: no such file"),
    ("/save no/such/talk", "no such folder: no/such"),
    ("bad \udcff", "lone surrogate at 4"),
  ],
)
def test_refusals_are_one_line(line, message, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  chat = Chat()
  before = chat.session, chat.talk.sampler, chat.talk.max_new_tokens
  assert message in chat.refuse(line)
  assert before == (chat.session, chat.talk.sampler, chat.talk.max_new_tokens)


def test_full_attention_has_room_for_so_many_tokens():
  chat = Chat(make_model("A"), room=16, max_new_tokens=2)
  assert "allocated for 16 tokens" in chat.say("/state")
  chat.say("0123456789")
  before = chat.session
  assert "has room for max_length=16 tokens" in chat.refuse("01234")
  assert chat.session is before and chat.repl.errors == 1
