"""Ends a process that is alive but makes no progress.

A hung collective or a dead file system blocks for ever, while heartbeats go
on. The loop reports every finished step; when the next one takes too long, the
watchdog prints the stacks of all threads and ends the process with `RETRY`.
"""

import contextlib
import faulthandler
import math
import os
import sys
import threading
import time
from collections.abc import Callable

from gdn2_jax.train.processes import RETRY

SAVE_FACTOR = 10.0


def _end(message: str) -> None:
  """Prints the stacks and leaves; no clean-up could be trusted to return."""
  with contextlib.suppress(Exception):
    print(message, file=sys.__stderr__, flush=True)
    faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
  os._exit(RETRY)


class Watchdog(contextlib.AbstractContextManager):
  """A thread that waits for `beat`, armed by the first one; 0 s is off.

  It needs the interpreter lock to act. Waiting for devices, collectives, files
  and locks releases it.
  """

  def __init__(self, seconds: float, end: Callable[[str], None] = _end):
    self._seconds = self._allowed = seconds
    self._deadline = math.inf  # not armed
    self._end = end
    self._closed = threading.Event()
    self._thread = threading.Thread(
      target=self._watch, name="watchdog", daemon=True
    )
    if seconds:
      self._thread.start()

  def beat(self) -> None:
    """Reports a finished step."""
    self._allow(self._seconds)

  def paused(self) -> contextlib.AbstractContextManager[None]:
    """Context for work of unknown duration, such as evaluation."""
    return self._allowing(math.inf)

  def saving(self) -> contextlib.AbstractContextManager[None]:
    """Context for a save that blocks: SAVE_FACTOR times as long as a step."""
    return self._allowing(SAVE_FACTOR * self._seconds)

  @contextlib.contextmanager
  def _allowing(self, seconds: float):
    armed = self._deadline < math.inf
    if armed:
      self._allow(seconds)
    try:
      yield
    finally:
      if armed:
        self._allow(self._seconds)

  def _allow(self, seconds: float) -> None:
    self._allowed = seconds
    self._deadline = time.monotonic() + seconds

  def _watch(self) -> None:
    while (left := self._deadline - time.monotonic()) > 0:
      # A new deadline is at least `_seconds` ahead: this wakes up before it.
      if self._closed.wait(min(left, self._seconds)):
        return
    self._end(
      f"no progress for {self._allowed:g} s (--config.watchdog_seconds="
      f"{self._seconds:g}), ending with exit code {RETRY}; all threads:"
    )

  def close(self) -> None:
    """Stops the thread."""
    self._closed.set()
    if self._seconds:
      self._thread.join()

  def __exit__(self, *_) -> None:
    self.close()
