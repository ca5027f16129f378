"""Texts and commands, answered until they end."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable
from typing import Any

from gdn2_jax import cli
from gdn2_jax.chat.talk import MAX_UNDO, Talk, tokens_read
from gdn2_jax.inference.checks import NonFiniteError
from gdn2_jax.inference.command.flags import check_file, check_seed
from gdn2_jax.inference.command.interrupt import Interrupt
from gdn2_jax.inference.command.printer import Output, Printer
from gdn2_jax.inference.command.turn import Turn
from gdn2_jax.inference.files.session import load_session, save_session
from gdn2_jax.inference.identity import Identity, identify

HELP = f"""\
A line is text: the model continues the document that all texts and answers so
far make up. An empty line continues it without more text. A line that ends in
a backslash goes on in the next one, after a line break. Ctrl-C ends an answer.

  /undo             back to before the last turn; {MAX_UNDO} turns are kept
  /fork NAME        keep a copy of the conversation as a branch
  /switch NAME      continue another branch; the first one is "main"
  /save FILE        write the conversation to a file
  /load FILE        continue the conversation of a file
  /state            bytes of the state, tokens read, branches
  /set NAME=VALUE   temperature, top_k, top_p, seed, max_new_tokens; without
                    NAME=VALUE prints them
  /help             this text
  /quit             end; so does Ctrl-D
  //text            text that begins with a slash
"""


class Repl:
  """Answers texts and runs commands.

  Args:
    talk: conversation.
    out: stream of the answers and of what commands print.
    err: stream of status lines and errors.
    file: session file, replaced after every answer and after all else that
      changes the conversation; None keeps nothing.
    identity: that of the model; computed when it is needed if None.
    dim: print status lines in a dim colour.
    working: context of the computation of an answer.

  Attributes:
    errors: number of texts and commands that were refused or failed.
  """

  def __init__(
    self,
    talk: Talk,
    out: Output,
    err: Output,
    *,
    file: str | None = None,
    identity: Identity | None = None,
    dim: bool = False,
    working: Callable[
      [], contextlib.AbstractContextManager
    ] = contextlib.nullcontext,
  ):
    self.talk, self.errors = talk, 0
    self._out, self._err, self._dim = out, err, dim
    self._file, self._working = file, working
    if identity is not None:
      self._identity = identity  # in place of the cached property
    self._commands: dict[str, Callable[[str], None]] = {
      "undo": self._undo,
      "fork": self._fork,
      "switch": self._switch,
      "save": self._save,
      "load": self._load,
      "state": self._state,
      "set": self._set,
      "help": self._help,
    }

  @functools.cached_property
  def _identity(self) -> Identity:
    model = self.talk.model
    return identify(model.params, model.config, model.tokenizer)

  def run(self, texts: Iterable[str]) -> int:
    """Answers all texts, up to /quit; returns the number of refused ones.

    Args:
      texts: what the user writes, as `chat.lines` yields it.
    """
    for text in texts:
      if text.strip() == "/quit":
        break
      try:
        self._take(text)
      except (ValueError, OSError) as e:
        # A bug, or nobody reads the answers any more.
        if isinstance(e, BrokenPipeError) or (
          isinstance(e, ValueError) and not cli.is_ours(e)
        ):
          raise
        self.errors += 1
        self._print_err(f"error: {e}")
    return self.errors

  def _take(self, text: str) -> None:
    if text.startswith("/") and not text.startswith("//"):
      name, _, argument = text[1:].partition(" ")
      if name not in self._commands:
        hint = cli.suggest(name, [*self._commands, "quit"])
        raise ValueError(f"/{name}: no such command; {hint}")
      self._commands[name](argument.strip())
    else:
      self._answer(text[1:] if text.startswith("//") else text)

  def _answer(self, text: str) -> None:
    ids = self.talk.encode(text)
    tail = [*self.talk.session.tail, *ids]
    printer = Printer(self.talk.model.tokenizer.decode, tail, self._out)
    with Interrupt() as interrupt, self._working():

      def on_tokens(tokens: list[int]) -> bool:
        printer.tokens(tokens)
        return interrupt.came

      try:
        turn = self.talk.answer(ids, on_tokens)
      except NonFiniteError as e:
        printer.end(complete=True)
        raise ValueError(f"{e}; the conversation is as before") from None
    printer.end(complete=turn.ended)
    # Before the status line: who has read it knows that the turn is kept.
    self._keep()
    self._print_status(turn, printer.rate)

  def _print_status(self, turn: Turn, rate: float | None) -> None:
    speed = "" if rate is None else f", {rate:.1f} tokens/s"
    end = ", end of the document" if turn.ended else ""
    self._print_err(
      f"[{len(turn.tokens)} tokens{speed}{end}; state "
      f"{self.talk.state_bytes:,} bytes]",
      dim=self._dim,
    )

  def _keep(self) -> None:
    """Replaces the session file."""
    if self._file is not None:
      save_session(self._file, self.talk.session, self._identity)

  def _undo(self, argument: str) -> None:
    _refuse("undo", argument)
    self.talk.undo()
    self._keep()
    self._print(f"{self.talk.tokens_read:,} tokens read")

  def _fork(self, name: str) -> None:
    self.talk.fork(_require_word("fork", name))
    self._print(f"kept as {name}; /switch {name} continues it")

  def _switch(self, name: str) -> None:
    _require_word("switch", name)
    if name not in self.talk.branches:
      hint = cli.suggest(name, self.talk.branches)
      raise ValueError(f"/switch {name}: no such branch; {hint}")
    self.talk.switch(name)
    self._keep()
    self._print(f"branch {name}, {self.talk.tokens_read:,} tokens read")

  def _save(self, name: str) -> None:
    file = _require_file("save", name)
    check_file(f"/save {name}", file)
    if os.path.exists(file):
      # Replaces sessions of this model only, nothing else by mistake.
      load_session(file, self._identity)
    save_session(file, self.talk.session, self._identity)
    self._print(f"{file}: {os.path.getsize(file):,} bytes")

  def _load(self, name: str) -> None:
    file = _require_file("load", name)
    self.talk.replace(load_session(file, self._identity, room=self.talk.room))
    self._keep()
    self._print(f"{file}: {self.talk.tokens_read:,} tokens read")

  def _state(self, argument: str) -> None:
    _refuse("state", argument)
    talk = self.talk
    size = "after any number of tokens"
    if talk.max_length is not None:
      size = f"allocated for {talk.max_length:,} tokens"
    self._print(f"state      {talk.state_bytes:,} bytes, {size}")
    self._print(f"read       {talk.tokens_read:,} tokens")
    self._print(f"undo       {len(talk.branch.past)} turns, {MAX_UNDO} at most")
    for name, branch in talk.branches.items():
      mark = " (current)" if name == talk.current else ""
      read = tokens_read(branch.now)
      self._print(f"branch     {name}, {read:,} tokens read{mark}")

  def _set(self, argument: str) -> None:
    # All are checked before any is changed.
    changes = dict(self._parse(setting) for setting in argument.split())
    seed = changes.pop("seed", None)
    max_new_tokens = changes.pop("max_new_tokens", self.talk.max_new_tokens)
    sampler = dataclasses.replace(self.talk.sampler, **changes)
    self.talk.use_sampler(sampler)
    self.talk.max_new_tokens = max_new_tokens
    if seed is not None:
      self.talk.use_seed(seed)
      self._keep()
    for name, value in self._settings().items():
      self._print(f"{name}={value}")

  def _settings(self) -> dict[str, float | int]:
    talk = self.talk
    return {
      "temperature": float(talk.sampler.temperature),
      "top_k": talk.sampler.top_k,
      "top_p": float(talk.sampler.top_p),
      "seed": talk.session.seed,
      "max_new_tokens": talk.max_new_tokens,
    }

  def _parse(self, setting: str) -> tuple[str, Any]:
    """Name and value of a setting."""
    name, _, text = setting.partition("=")
    settings = self._settings()
    if name not in settings:
      raise ValueError(f"/set {name}: {cli.suggest(name, settings)}")
    kind: Any = type(settings[name])
    try:
      value = kind(text)
    except ValueError:
      expected = "a number" if kind is float else "an integer"
      raise ValueError(f"/set {setting}: expected {expected}") from None
    if name == "seed":
      check_seed(f"/set {setting}", value)
    if name == "max_new_tokens" and value < 1:
      raise ValueError(f"/set {setting}: expected >= 1")
    return name, value

  def _help(self, argument: str) -> None:
    _refuse("help", argument)
    self._print(HELP.rstrip())

  def _print(self, text: str) -> None:
    self._out.write(text + "\n")
    self._out.flush()

  def _print_err(self, text: str, dim: bool = False) -> None:
    self._err.write((f"\x1b[2m{text}\x1b[0m" if dim else text) + "\n")
    self._err.flush()


def _refuse(command: str, argument: str) -> None:
  if argument:
    raise ValueError(f"/{command}: expected nothing after it, got {argument!r}")


def _require_word(command: str, argument: str) -> str:
  if len(argument.split()) != 1:
    raise ValueError(f"/{command}: expected a name, got {argument!r}")
  return argument


def _require_file(command: str, argument: str) -> str:
  if not argument:
    raise ValueError(f"/{command}: expected a file")
  return os.path.expanduser(argument)
