r"""Continues a prompt with a trained model, printing the text as it comes.

  python -m gdn2_jax.generate --workdir=runs/tiny --prompt="Return the"
  python -m gdn2_jax.generate --workdir=runs/tiny --prompt="def " --greedy
  python -m gdn2_jax.generate --workdir=runs/tiny --prompt="Return the" \
    --temperature=0.7 --top_k=50 --top_p=0.9 --max_new_tokens=400 --seed=3
  python -m gdn2_jax.generate --model=models/published --prompt="Return the"

The workdir is that of `python -m gdn2_jax.train`; --step picks one of its
checkpoints, by default the newest. --model takes a folder with a published
model instead. The text ends at the end of a document or after
--max_new_tokens; Ctrl-C ends it earlier. The same flags give the same text.
Speed is reported on standard error.

A conversation continues in another process, days later:

  python -m gdn2_jax.generate --workdir=runs/tiny --session=talk.safetensors \
    --prompt="Return the"
  python -m gdn2_jax.generate --workdir=runs/tiny --session=talk.safetensors
  python -m gdn2_jax.generate --workdir=runs/tiny --session=talk.safetensors \
    --prompt=" and then"

The first call makes the file. Each later one continues the text, after adding
--prompt if it is given, and replaces the file. The text so far is not read
again: the file holds the state of the model after it, which is as large after a
million tokens as after one. It is valid for this model, these weights and this
tokenizer alone. Two calls give exactly the tokens of one long call with the
same flags; the seed is in the file. A document that has ended continues in
place of its end, and only with a --prompt. A call that is killed leaves the
file as it was.

Exit status: 0 done; 1 refused, or logits that are not finite (the reason is on
standard error, and a session file is left as it was); 130 Ctrl-C twice.
"""

import dataclasses
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable

import jax
from absl import flags

from gdn2_jax import cli
from gdn2_jax.inference import (
  Generated,
  NonFiniteError,
  Sampler,
  TextStream,
  generate,
)
from gdn2_jax.inference.files.session import Session, load_session, save_session
from gdn2_jax.inference.identity import Identity, identify
from gdn2_jax.interop.folder import Model
from gdn2_jax.kernels import self_check
from gdn2_jax.train.checkpoint import open_model as opening
from gdn2_jax.train.checkpoint.open_model import check_flags, open_model

flags.adopt_module_key_flags(opening)  # so that --help lists them
_SESSION = flags.DEFINE_string(
  "session",
  None,
  "File of a conversation: made with --prompt if it does not exist, else "
  "continued, with or without --prompt.",
)
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue.")
_MAX_NEW_TOKENS = flags.DEFINE_integer(
  "max_new_tokens", 128, "Tokens to add at most, >= 1."
)
_TEMPERATURE = flags.DEFINE_float(
  "temperature", 0.8, "Below 1 sharpens, above 1 flattens; 0 is --greedy."
)
_TOP_K = flags.DEFINE_integer(
  "top_k", 0, "Draw among this many most probable tokens only; 0 = all."
)
_TOP_P = flags.DEFINE_float(
  "top_p",
  0.95,
  "Draw among the most probable tokens that together reach this probability "
  "only; 1 = all.",
)
_GREEDY = flags.DEFINE_bool(
  "greedy", False, "Always take the most probable token."
)
_SEED = flags.DEFINE_integer(
  "seed",
  None,
  "Seed of the draws, 0 to 2**32 - 1; by default that of the session, or 0.",
)
_SELF_CHECK = cli.define_self_check()

_TOKENS_PER_DISPATCH = 8
_TAIL = 16  # tokens that may share a character with the next one, and more


def main(argv: list[str]) -> None:
  """Entry point: checks the command line, loads the model, streams text."""
  cli.refuse_positional(argv, '--prompt="Return the"')
  self_check.enable(_SELF_CHECK.value)
  with cli.one_line_errors():
    sampler = _check_flags()
    name, model = open_model()
    identity = None
    if _SESSION.value:
      identity = identify(model.params, model.config, model.tokenizer)
    ids = model.tokenizer.encode(_PROMPT.value or "")
    session = _begin(identity, len(ids))
    sampler = dataclasses.replace(
      sampler, vocab_size=model.tokenizer.vocab_size
    )
    sampler.check(model.config.vocab_size)
    printer = _Printer(model.tokenizer.decode, session.tail)
    printer.prompt(_PROMPT.value, ids)
    try:
      generated = _generate(model, session, ids, sampler, printer)
    except NonFiniteError:
      printer.end(complete=True)  # the reason begins a line of its own
      raise
    ended = generated.pending[0] == model.tokenizer.eos_id
    printer.end(complete=ended or identity is None)
    report = f"{name}, {len(ids)} prompt tokens{printer.speed()}"
    if identity is not None:
      _save(session, generated, ended, ids, identity)
      length = int(generated.state.position[0]) + (not ended)
      report += f"; {_SESSION.value}: {length} tokens so far"
    print(f"[{report}]", file=sys.stderr)


def _check_flags() -> Sampler:
  """Refuses bad flags before anything is loaded; returns the sampler."""
  check_flags()
  if _SESSION.value is not None:
    _check_session(_SESSION.value)
  elif not _PROMPT.value:
    raise ValueError('--prompt is missing or empty, e.g. --prompt="Return the"')
  if _MAX_NEW_TOKENS.value < 1:
    raise ValueError(f"--max_new_tokens={_MAX_NEW_TOKENS.value}: expected >= 1")
  if _SEED.value is not None and not 0 <= _SEED.value < 2**32:
    raise ValueError(f"--seed={_SEED.value}: expected 0 to 2**32 - 1")
  return Sampler(
    temperature=0.0 if _GREEDY.value else _TEMPERATURE.value,
    top_k=_TOP_K.value,
    top_p=_TOP_P.value,
  )


def _check_session(file: str) -> None:
  """Refuses a file that could not be read or written in the end."""
  path = pathlib.Path(file)
  if not file or path.is_dir():
    raise ValueError(f"--session={file}: expected a file")
  if not path.exists() and not _PROMPT.value:
    raise ValueError(
      f"--session={file}: no such file; a new conversation needs --prompt"
    )
  folder = path.absolute().parent
  if not folder.is_dir():
    raise ValueError(f"--session={file}: no such folder: {path.parent}")
  if not os.access(folder, os.W_OK):
    raise ValueError(f"--session={file}: cannot write to {path.parent}")


def _begin(identity: Identity | None, prompt_tokens: int) -> Session:
  """The session of the file, or a new one; with the seed of the flag."""
  session = Session(state=None, pending=None, draws=0, seed=0)
  if identity is not None and os.path.exists(_SESSION.value):
    # The token that the state has not read yet is one more.
    room = 1 + prompt_tokens + _MAX_NEW_TOKENS.value
    session = load_session(_SESSION.value, identity, room=room)
    if session.pending is None and not _PROMPT.value:
      raise ValueError(
        f"--session={_SESSION.value}: its text has ended; give a --prompt to "
        "continue"
      )
  if _SEED.value is not None:
    session = dataclasses.replace(session, seed=_SEED.value)
  return session


def _generate(
  model: Model,
  session: Session,
  ids: list[int],
  sampler: Sampler,
  printer: "_Printer",
) -> Generated:
  """Generates and prints until the end, the last token, or Ctrl-C."""
  pending = [] if session.pending is None else [session.pending]
  with _Interrupt() as interrupt:

    def on_tokens(_, tokens: list[int]) -> bool:
      printer.tokens(tokens)
      return interrupt.came

    return generate(
      model.params,
      model.config,
      [pending + ids],
      _MAX_NEW_TOKENS.value,
      rng=jax.random.key(session.seed),
      sampler=sampler,
      stop_ids=(model.tokenizer.eos_id,),
      state=session.state,
      index=session.draws,
      on_tokens=on_tokens,
      return_state=True,
      tokens_per_dispatch=_TOKENS_PER_DISPATCH,
    )


def _save(session, generated, ended, ids, identity) -> None:
  tail = (*session.tail, *ids, *generated.tokens[0])
  save_session(
    _SESSION.value,
    Session(
      state=generated.state,
      # The end of a document is not part of a continued text.
      pending=None if ended else generated.pending[0],
      draws=generated.index[0],
      seed=session.seed,
      tail=tail[-_TAIL:],
    ),
    identity,
  )


class _Interrupt:
  """Notes the first Ctrl-C, which ends the text; the second one exits."""

  came = False

  def __enter__(self) -> "_Interrupt":
    self._before = signal.signal(signal.SIGINT, self._note)
    return self

  def _note(self, *_) -> None:
    self.came = True
    signal.signal(signal.SIGINT, self._leave)

  def _leave(self, *_) -> None:
    print("\ninterrupted", file=sys.stderr, flush=True)
    os._exit(130)  # JAX may be computing in other threads

  def __exit__(self, *_) -> None:
    signal.signal(signal.SIGINT, self._before)


class _Printer:
  """Prints text as it comes, and measures its speed.

  Args:
    decode: maps token ids to text.
    tail: the last tokens of the earlier text, which is not printed again.
  """

  def __init__(self, decode: Callable[[list[int]], str], tail: tuple[int, ...]):
    self._decode = decode
    self._text = _stream_after(decode, tail)
    self._times: list[float] = []  # of every token
    self._start = time.perf_counter()

  def prompt(self, prompt: str | None, ids: list[int]) -> None:
    """Prints text of the user."""
    if prompt:
      # A character that the earlier text left unfinished stays so.
      _print(self._text.flush() + prompt)
      self._text = _stream_after(self._decode, ids[-_TAIL:])

  def tokens(self, tokens: list[int]) -> None:
    """Prints tokens that were generated."""
    self._times += [time.perf_counter() - self._start] * len(tokens)
    _print("".join(self._text.push(token) for token in tokens))

  def end(self, complete: bool) -> None:
    """Ends the line; if no more can follow, with the text held back."""
    _print((self._text.flush() if complete else "") + "\n")

  def speed(self) -> str:
    """Latency, speed and number of tokens, as the end of a sentence."""
    times, report = self._times, ""
    if times:
      report = f", first token after {times[0]:.2f} s with compilation"
    warm = 1 + _TOKENS_PER_DISPATCH
    if len(times) > warm:
      speed = (len(times) - warm) / (times[-1] - times[warm - 1])
      report += f", then {speed:.1f} tokens/s"
    return f"{report}, {len(times)} tokens"


def _stream_after(decode, tokens) -> TextStream:
  """A TextStream that has returned the text of these tokens already."""
  text = TextStream(decode)
  for token in tokens:
    text.push(token)
  return text


def _print(text: str) -> None:
  print(text, end="", flush=True)


if __name__ == "__main__":
  cli.run(main, __doc__)
