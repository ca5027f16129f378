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
import sys

from absl import flags

from gdn2_jax import cli
from gdn2_jax.inference.checks import NonFiniteError
from gdn2_jax.inference.command import flags as text_flags
from gdn2_jax.inference.command.flags import (
  MAX_NEW_TOKENS,
  SEED,
  SESSION,
  check_text_flags,
)
from gdn2_jax.inference.command.interrupt import Interrupt
from gdn2_jax.inference.command.printer import Printer
from gdn2_jax.inference.command.turn import Turn, continue_session
from gdn2_jax.inference.files.session import Session, load_session, save_session
from gdn2_jax.inference.identity import Identity, identify
from gdn2_jax.inference.sampling import Sampler
from gdn2_jax.interop.folder import Model
from gdn2_jax.kernels import self_check
from gdn2_jax.train.checkpoint import open_model as opening
from gdn2_jax.train.checkpoint.open_model import check_flags, open_model

flags.adopt_module_key_flags(opening)  # so that --help lists them
flags.adopt_module_key_flags(text_flags)
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue.")
_SELF_CHECK = cli.define_self_check()


def main(argv: list[str]) -> None:
  """Entry point: checks the command line, loads the model, streams text."""
  cli.refuse_positional(argv, '--prompt="Return the"')
  self_check.enable(_SELF_CHECK.value)
  with cli.one_line_errors():
    sampler = _check_flags()
    name, model = open_model()
    identity = None
    if SESSION.value:
      identity = identify(model.params, model.config, model.tokenizer)
    ids = model.tokenizer.encode(_PROMPT.value or "")
    session = _begin(identity, len(ids))
    sampler = dataclasses.replace(
      sampler, vocab_size=model.tokenizer.vocab_size
    )
    sampler.check(model.config.vocab_size)
    printer = Printer(model.tokenizer.decode, session.tail, sys.stdout)
    printer.prompt(_PROMPT.value, ids)
    try:
      turn = _generate(model, session, ids, sampler, printer)
    except NonFiniteError:
      printer.end(complete=True)  # the reason begins a line of its own
      raise
    printer.end(complete=turn.ended or identity is None)
    report = f"{name}, {len(ids)} prompt tokens{_speed(printer)}"
    if identity is not None:
      save_session(SESSION.value, turn.session, identity)
      length = int(turn.session.state.position[0]) + (not turn.ended)
      report += f"; {SESSION.value}: {length} tokens so far"
    print(f"[{report}]", file=sys.stderr)


def _check_flags() -> Sampler:
  """Refuses bad flags before anything is loaded; returns the sampler."""
  check_flags()
  sampler = check_text_flags()
  if SESSION.value is None and not _PROMPT.value:
    raise ValueError('--prompt is missing or empty, e.g. --prompt="Return the"')
  if SESSION.value and not (_PROMPT.value or os.path.exists(SESSION.value)):
    raise ValueError(
      f"--session={SESSION.value}: no such file; a new conversation needs "
      "--prompt"
    )
  return sampler


def _begin(identity: Identity | None, prompt_tokens: int) -> Session:
  """The session of the file, or a new one; with the seed of the flag."""
  session = Session(state=None, pending=None, draws=0, seed=0)
  if identity is not None and os.path.exists(SESSION.value):
    # The token that the state has not read yet is one more.
    room = 1 + prompt_tokens + MAX_NEW_TOKENS.value
    session = load_session(SESSION.value, identity, room=room)
    if session.pending is None and not _PROMPT.value:
      raise ValueError(
        f"--session={SESSION.value}: its text has ended; give a --prompt to "
        "continue"
      )
  if SEED.value is not None:
    session = dataclasses.replace(session, seed=SEED.value)
  return session


def _generate(
  model: Model,
  session: Session,
  ids: list[int],
  sampler: Sampler,
  printer: Printer,
) -> Turn:
  """Generates and prints until the end, the last token, or Ctrl-C."""
  with Interrupt() as interrupt:

    def on_tokens(tokens: list[int]) -> bool:
      printer.tokens(tokens)
      return interrupt.came

    return continue_session(
      model, session, ids, sampler, MAX_NEW_TOKENS.value, on_tokens
    )


def _speed(printer: Printer) -> str:
  """Latency, speed and number of tokens, as the end of a sentence."""
  report = ""
  if printer.latency is not None:
    report = f", first token after {printer.latency:.2f} s with compilation"
  if printer.rate is not None:
    report += f", then {printer.rate:.1f} tokens/s"
  return f"{report}, {printer.count} tokens"


if __name__ == "__main__":
  cli.run(main, __doc__)
