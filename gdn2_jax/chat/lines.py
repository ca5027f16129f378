"""Texts and commands of the user, from a terminal or from a script.

A line that ends in a backslash goes on in the next one, after a line break.
"""

import contextlib
import sys
from collections.abc import Iterable, Iterator

PROMPT, MORE = "> ", "  "


def read_terminal() -> Iterator[str]:
  """Yields what the user types, with editing and history.

  Ctrl-D ends it. Ctrl-C drops what was typed since the last answer.
  """
  with contextlib.suppress(ImportError):
    import readline  # noqa: F401, input() then edits lines and has a history
  parts: list[str] = []
  while True:
    try:
      line = input(MORE if parts else PROMPT)
    except EOFError:
      print()
      return
    except KeyboardInterrupt:
      print("\n(Ctrl-D or /quit ends)", file=sys.stderr)
      parts = []
      continue
    parts.append(line.removesuffix("\\"))
    if not line.endswith("\\"):
      yield "\n".join(parts)
      parts = []


def read_script(lines: Iterable[str]) -> Iterator[str]:
  """Yields texts of a file's lines; the last one may end in a backslash."""
  parts: list[str] = []
  for line in lines:
    line = line.removesuffix("\n").removesuffix("\r")
    parts.append(line.removesuffix("\\"))
    if not line.endswith("\\"):
      yield "\n".join(parts)
      parts = []
  if parts:
    yield "\n".join(parts)
