"""Ending a run early without losing the current step.

With one process, SIGTERM and the first SIGINT set a flag that the loop reads
between steps; a second signal of the same kind acts as if nothing had been
installed. With several processes the same step must be saved everywhere, which
only JAX's preemption notifier can agree on, and a Python handler would silence
it: then nothing is installed and orbax is asked instead.
"""

import signal
from collections.abc import Callable

import jax


class Preemption:
  """Context manager that turns signals into a question asked every step.

  Args:
    reached: for several processes, whether all of them agreed to stop at this
      step (`Checkpointer.reached_preemption`).
  """

  def __init__(self, reached: Callable[[int], bool]):
    self._reached = reached
    self._received: signal.Signals | None = None
    self._previous: dict = {}

  def __enter__(self) -> "Preemption":
    if jax.process_count() == 1:
      for number in (signal.SIGTERM, signal.SIGINT):
        self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_) -> None:
    self._restore()

  def _handle(self, number: int, frame) -> None:
    del frame
    self._received = signal.Signals(number)
    self._restore()

  def _restore(self) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    self._previous = {}

  def due(self, step: int) -> bool:
    """Whether to save and stop after `step` steps."""
    return self._received is not None or self._reached(step)

  @property
  def reason(self) -> str:
    """Name of the signal."""
    return self._received.name if self._received else "preemption notice"
