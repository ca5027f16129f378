"""Ctrl-C while text is generated."""

import os
import signal
import sys


class Interrupt:
  """Notes the first Ctrl-C, which ends the text; the second one exits.

  A context manager, for the main thread.

  Attributes:
    came: True after a Ctrl-C.
  """

  came = False

  def __enter__(self) -> "Interrupt":
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
