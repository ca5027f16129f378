"""Common behaviour of entry points: one-line errors, strict arguments."""

import contextlib
import difflib
import pathlib
import sys
import traceback
import types
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging

_HELP = {"-h", "-help", "--help", "--helpshort"}


def fail(message: str) -> NoReturn:
  """Prints one line to stderr and exits with code 1."""
  print(f"error: {message}", file=sys.stderr, flush=True)
  sys.exit(1)


def refuse_positional(argv: Sequence[str], example: str) -> None:
  """Exits for `flag=value` without dashes; the message has an `example`."""
  if len(argv) > 1:
    fail(
      f"unexpected argument {argv[1]!r}; flags start with --, as in {example}"
    )


def take_command(
  names: Collection[str], index: str, default: str | None = None
) -> str:
  """Removes a command's name from sys.argv and returns it.

  Without a command prints the `index` of all and exits with code 0, as --help
  does; with a `default`, flags alone belong to that command.
  """
  first = sys.argv[1] if len(sys.argv) > 1 else ""
  if first in _HELP or not (first or default):
    try:
      print(index.strip(), flush=True)
    except BrokenPipeError:  # as in `gdn2 --help | head`
      sys.stdout = None
    sys.exit(0)
  if default and (not first or first.startswith("-")):
    return default
  if first not in names:
    fail(f"{first}: no such command; {suggest(first, names)}")
  return sys.argv.pop(1)


def suggest(name: str, names: Collection[str]) -> str:
  """The nearest of the right names as a question, or all of them."""
  near = difflib.get_close_matches(name, names, n=1)
  return f"did you mean {near[0]}?" if near else f"one of {', '.join(names)}"


def define_self_check() -> flags.FlagHolder:
  """Defines --self_check, the same for all that may run GPU kernels."""
  return flags.DEFINE_bool(
    "self_check",
    True,
    "Compare GPU kernels with XLA before their first use on a kind of device, "
    "and use XLA instead where they are wrong.",
  )


def python_command() -> str:
  """Command that runs this Python from the current directory."""
  path, here = pathlib.Path(sys.executable), pathlib.Path.cwd()
  return str(path.relative_to(here)) if path.is_relative_to(here) else "python"


def is_ours(error: BaseException) -> bool:
  """True if code of this package raised the error, not a library."""
  return is_our_frame(list(traceback.walk_tb(error.__traceback__))[-1][0])


def is_our_frame(frame: types.FrameType) -> bool:
  """True if a stack frame runs code of this package."""
  # Not by __name__: the module that is run as a program is called __main__.
  package = frame.f_globals.get("__package__") or ""
  return package.split(".")[0] == "gdn2_jax"


@contextlib.contextmanager
def one_line_errors(*more: type[Exception]) -> Iterator[None]:
  """Turns refusals of bad input into one line and exit code 1.

  A ValueError, OSError or NotImplementedError (a named kernel that cannot run)
  that this package raised, and `more` from anywhere, are messages to the user;
  others are bugs and keep their traceback.
  """
  try:
    yield
  except more as e:
    fail(str(e))
  except (ValueError, OSError, NotImplementedError) as e:
    if not is_ours(e):
      raise
    fail(str(e))


def _parse_flags(argv: list[str]) -> list[str]:
  """Parses flags; one line for errors, code 0 for --help."""
  given = set(argv[1 : argv.index("--")] if "--" in argv else argv[1:])
  # absl itself would exit with code 1.
  if given & _HELP:
    app.usage(shorthelp=True, writeto_stdout=True, exitcode=0)
  if "--helpfull" in given:
    app.usage(writeto_stdout=True, exitcode=0)
  # Orbax logs every file it writes at level INFO. Set before parsing, so that
  # --verbosity overrides it.
  logging.set_verbosity(logging.WARNING)
  try:
    return flags.FLAGS(argv)
  except flags.Error as e:
    fail(" ".join(str(e).split()) + " (--help lists the flags)")
  # Those of ml_collections.
  except (KeyError, OSError, TypeError, ValueError) as e:
    fail(str(e.args[0] if e.args else e))


def run(main: Callable[[list[str]], Any], help_text: str) -> None:
  """app.run with one-line flag errors; `help_text` opens --help."""
  sys.modules["__main__"].__doc__ = help_text.replace("%", "%%")
  if main.__module__ != "__main__":
    # --help lists the flags of the program's file, and `main` is in another.
    for flag in flags.FLAGS.get_key_flags_for_module(main.__module__):
      flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
  app.run(main, flags_parser=_parse_flags)
