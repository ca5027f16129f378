"""Ends a process that is alive but no longer moves.

A hung collective or a dead file system blocks for ever, and heartbeats go on
all the while. The loop reports every finished step; when the next one takes too
long, the watchdog prints where every thread is and ends the process with
EXIT_STUCK, which launchers take as "start again".
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

EXIT_STUCK = 75  # EX_TEMPFAIL: the same command may well work the next time
SAVE_FACTOR = 10.0


def _end(message: str) -> None:
  """Prints the stacks and leaves; no clean-up could be trusted to return."""
  with contextlib.suppress(Exception):
    print(message, file=sys.__stderr__, flush=True)
    faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
  os._exit(EXIT_STUCK)


class Watchdog:
  """A thread that waits for `beat`, armed by the first one; 0 s is off.

  It needs the interpreter lock to act. Waiting for devices, collectives, files
  and locks releases it.
  """

  def __init__(self, seconds: float, end: Callable[[str], None] = _end):
    self._seconds = seconds
    self._end = end
    self._deadline: float | None = None
    self._allowed = seconds
    self._changed = threading.Condition()
    self._closed = False
    self._thread: threading.Thread | None = None

  def beat(self) -> None:
    """Tells that a step has finished."""
    if not self._seconds:
      return
    with self._changed:
      self._allowed = self._seconds
      self._deadline = time.monotonic() + self._seconds
      # The thread wakes at the deadline it knows, and then sees this one.
      if self._thread is None:
        self._thread = threading.Thread(
          target=self._watch, name="watchdog", daemon=True
        )
        self._thread.start()

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """For work without a known duration, such as evaluation."""
    with self._allowing(None):
      yield

  @contextlib.contextmanager
  def saving(self) -> Iterator[None]:
    """For a save that blocks: SAVE_FACTOR times as long as a step."""
    with self._allowing(SAVE_FACTOR * self._seconds):
      yield

  @contextlib.contextmanager
  def _allowing(self, seconds: float | None) -> Iterator[None]:
    with self._changed:
      armed = self._deadline is not None
      if armed:
        self._set(seconds)
    try:
      yield
    finally:
      with self._changed:
        if armed:
          self._set(self._seconds)

  def _set(self, seconds: float | None) -> None:
    self._allowed = seconds or 0.0
    later = None if seconds is None else time.monotonic() + seconds
    self._deadline = later
    self._changed.notify()

  def _watch(self) -> None:
    with self._changed:
      while not self._closed:
        if self._deadline is None:
          self._changed.wait()
          continue
        left = self._deadline - time.monotonic()
        if left > 0:
          self._changed.wait(left)
          continue
        break
      if self._closed:
        return
      allowed = self._allowed
    self._end(
      f"no progress for {allowed:g} s (--config.watchdog_seconds="
      f"{self._seconds:g}), ending with exit code {EXIT_STUCK}; all threads:"
    )

  def close(self) -> None:
    """Stops watching."""
    with self._changed:
      self._closed = True
      self._changed.notify()
    if self._thread is not None:
      self._thread.join()

  def __enter__(self) -> "Watchdog":
    return self

  def __exit__(self, *_) -> None:
    self.close()
