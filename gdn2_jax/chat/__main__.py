r"""Talks with a trained model: it continues the text line by line.

  gdn2 chat --workdir=runs/tiny
  gdn2 chat --workdir=runs/tiny --session=talk.safetensors
  gdn2 chat --model=models/published --temperature=0.7 --max_new_tokens=60
  printf 'def add(a, b):\\\n  return\n' | gdn2 chat --workdir=runs/tiny --greedy

These are base models, which continue text. There is no chat template: the text
so far, lines and answers alike, is one document, and the model continues it. A
line is added as it is typed; a line that ends in a backslash goes on in the
next one, after a line break; an empty line continues without more text. An
answer ends at the end of a document or after --max_new_tokens; Ctrl-C ends it
earlier, and what is shown by then belongs to the text. Ctrl-D or /quit ends the
program. /help lists the commands:

  /undo   /fork NAME   /switch NAME   /save FILE   /load FILE   /state
  /set temperature=0.7   /help   /quit

Nothing is read twice: the model's memory of the text is one state of fixed
size. Earlier states are kept, so /undo and /fork cost no computation; a branch
keeps the last 64, each of them as large as /state tells.

--session is a file of `gdn2 generate --session` too: it is continued if it
exists, else made, and replaced in one step after every answer. After a kill or
a power cut the next start continues after the last complete answer.

--workdir is that of `gdn2 train`; --step picks one of its checkpoints, by
default the newest. --model takes a folder with a published model instead.
Compiled programs are kept in WORKDIR/.jax_cache, or, without one, in
$XDG_CACHE_HOME/gdn2_jax/jax (~/.cache/gdn2_jax/jax): "[compiling]" is printed
when one is made, at the first answer of the first start.

Without a terminal, lines are read from standard input and answers printed, each
with a line break after it; speeds and errors go to standard error.

Exit status: 0 done; 1 refused, or without a terminal a line that was refused or
failed; 130 Ctrl-C twice during an answer, or once in a script between answers.
"""

import functools
import os
import sys

from absl import flags

from gdn2_jax import cli
from gdn2_jax.chat.lines import read_script, read_terminal
from gdn2_jax.chat.repl import Repl
from gdn2_jax.chat.talk import Talk
from gdn2_jax.inference.command import flags as text_flags
from gdn2_jax.inference.command.flags import (
  MAX_NEW_TOKENS,
  SEED,
  SESSION,
  check_text_flags,
)
from gdn2_jax.inference.command.programs import CompilingNote, use_cache
from gdn2_jax.inference.files.session import load_session
from gdn2_jax.inference.identity import identify
from gdn2_jax.kernels import self_check
from gdn2_jax.train.checkpoint import open_model as opening
from gdn2_jax.train.checkpoint.open_model import check_flags, open_model

flags.adopt_module_key_flags(opening)  # so that --help lists them
flags.adopt_module_key_flags(text_flags)
_ROOM = flags.DEFINE_integer(
  "room",
  4096,
  "Tokens that may follow, >= 16, for models with full attention, whose keys "
  "and values are allocated in advance; others ignore it.",
)
_SELF_CHECK = cli.define_self_check()


def main(argv: list[str]) -> None:
  """Entry point: loads the model, then reads lines until they end."""
  cli.refuse_positional(argv, "--workdir=runs/tiny")
  self_check.enable(_SELF_CHECK.value)
  terminal = sys.stdin.isatty() and sys.stdout.isatty()
  with cli.one_line_errors():
    repl, name = _open()
    if terminal:
      print(f"{name}; /help lists commands", file=sys.stderr)
    elif hasattr(sys.stdin, "reconfigure"):
      # The tokenizer refuses a line that is not UTF-8, and the others count.
      sys.stdin.reconfigure(errors="surrogateescape")
    texts = read_terminal() if terminal else read_script(sys.stdin)
    try:
      errors = repl.run(texts)
    except KeyboardInterrupt:  # not during an answer
      print("interrupted", file=sys.stderr)
      sys.exit(130)
  if errors and not terminal:
    sys.exit(1)


def _open() -> tuple[Repl, str]:
  """The conversation that the flags name, and the model's name."""
  check_flags()
  sampler = check_text_flags()
  if _ROOM.value < 16:
    raise ValueError(f"--room={_ROOM.value}: expected >= 16")
  if reason := use_cache(flags.FLAGS.workdir):
    print(f"[{reason}]", file=sys.stderr)
  name, model = open_model()
  session = identity = None
  if SESSION.value:
    identity = identify(model.params, model.config, model.tokenizer)
    if os.path.exists(SESSION.value):
      session = load_session(SESSION.value, identity, room=_ROOM.value)
  talk = Talk(
    model,
    sampler=sampler,
    max_new_tokens=MAX_NEW_TOKENS.value,
    room=_ROOM.value,
    session=session,
    seed=SEED.value,
  )
  if session is not None:
    name += f", {SESSION.value}: {talk.tokens_read:,} tokens read"
  repl = Repl(
    talk,
    sys.stdout,
    sys.stderr,
    file=SESSION.value,
    identity=identity,
    dim=sys.stderr.isatty(),
    working=functools.partial(CompilingNote, sys.stderr),
  )
  return repl, name


if __name__ == "__main__":
  cli.run(main, __doc__)
