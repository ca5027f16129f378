"""A running loop's lock, watchdog and stop signals.

With one process, SIGTERM and the first SIGINT set a flag that the loop reads
between steps; a second signal of the same kind has its usual effect. With
several processes all must save the same step. Only JAX's preemption notifier
agrees on one, and a Python handler would silence it: then no handler is
installed, and orbax asks the notifier.
"""

import contextlib
import signal
from collections.abc import Callable, Iterator

import jax

from gdn2_jax.train.processes.lock import WorkdirLock
from gdn2_jax.train.processes.watchdog import Watchdog


class Guard:
  """Signs of life of a loop, and the request to stop it."""

  def __init__(
    self,
    lock: WorkdirLock | None,  # only the first process holds it
    watchdog: Watchdog,
    reached: Callable[[int], bool],  # several processes agreed on this step
  ):
    self._lock = lock
    self._watchdog = watchdog
    self._reached = reached
    self._beats = 0
    self._received: signal.Signals | None = None
    self._previous: dict = {}

  def beat(self) -> None:
    """Reports a dispatched step to the lock and the watchdog."""
    if self._lock is not None:
      self._lock.beat()
    self._beats += 1
    # By the second beat the results of a step were read. The first step
    # compiles, and has no limit.
    if self._beats > 1:
      self._watchdog.beat()

  def stop_reason(self, step: int) -> str:
    """Name of the request to save and stop after `step` steps, or ""."""
    if self._received is not None:
      return self._received.name
    if jax.process_count() > 1 and self._reached(step):
      return "preemption notice"
    return ""

  @contextlib.contextmanager
  def taking_signals(self) -> Iterator[None]:
    """Turns SIGTERM and Ctrl-C into a `stop_reason`, for one process."""
    if jax.process_count() == 1:
      for number in (signal.SIGTERM, signal.SIGINT):
        self._previous[number] = signal.signal(number, self._handle)
    try:
      yield
    finally:
      self._restore()

  def _handle(self, number: int, frame) -> None:
    del frame
    self._received = signal.Signals(number)
    self._restore()

  def _restore(self) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    self._previous = {}
