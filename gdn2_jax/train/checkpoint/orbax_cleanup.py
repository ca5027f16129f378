"""Clean-up after a checkpoint that could not be read or written."""

import asyncio
import contextlib
import gc
import sys
import time
import warnings

_IN_FLIGHT_SECONDS = 0.1


def end_orphans() -> None:
  """Ends the tasks that a failed read or write of orbax leaves behind.

  Its event loop is closed while they still wait on it. Collected later, at the
  latest on exit, they would print errors to stderr.
  """
  hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
  try:
    # Reads in flight report to the closed loop, and fail at that.
    time.sleep(_IN_FLIGHT_SECONDS)
    for task in gc.get_objects():
      if isinstance(task, asyncio.Task) and task.get_loop().is_closed():
        with contextlib.suppress(Exception):
          task._log_destroy_pending = False
          if task.done():
            task.exception()  # now it counts as seen
          else:
            task.get_coro().close()
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", RuntimeWarning)
      gc.collect()
  finally:
    sys.unraisablehook = hook
