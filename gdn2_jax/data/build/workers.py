"""Worker processes that end with the process that started them."""

import concurrent.futures
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

# Set once per worker process, so that tasks stay small.
_shared: tuple[Any, ...] = ()


def run_tasks(
  function: Callable[..., Any],
  tasks: Sequence[Any],
  shared: tuple[Any, ...],
  count: int,
) -> Iterator[tuple[Any, Any]]:
  """Yields (task, function(task, *shared)) as tasks finish.

  Args:
    function: a function of a module, as it is looked up in each process.
    tasks: picklable, small.
    shared: further arguments of every call, sent once to each process.
    count: processes; 0 runs in the caller's.

  Raises:
    RuntimeError: if a worker process died, for example for want of memory.
    Exception: the first one that a task raised.
  """
  if not count:
    for task in tasks:
      yield task, function(task, *shared)
    return
  others = multiprocessing.active_children()
  pool = concurrent.futures.ProcessPoolExecutor(
    count,
    # A fork would copy threads of the tokenizer in an unknown state.
    mp_context=multiprocessing.get_context("spawn"),
    initializer=_initialize,
    initargs=(os.getpid(), shared),
  )
  try:
    waiting = {pool.submit(_call, function, task): task for task in tasks}
    for future in concurrent.futures.as_completed(waiting):
      yield waiting[future], future.result()
  except BaseException as error:
    # An unfinished task is done again by the next build: waiting for it would
    # only delay the error or the Ctrl-C.
    for child in multiprocessing.active_children():
      if child not in others:
        child.kill()
    if isinstance(error, BrokenProcessPool):
      raise RuntimeError(
        f"a worker process died; is there memory for {count} of them? (fewer:"
        " --workers)"
      ) from error
    raise
  finally:
    pool.shutdown(cancel_futures=True)


def _initialize(parent: int, shared: tuple[Any, ...]) -> None:
  global _shared
  _shared = shared
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops us
  # One process per core already; threads on top would only get in the way.
  os.environ["TOKENIZERS_PARALLELISM"] = "false"
  threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: int) -> None:
  while os.getppid() == parent:  # a killed parent cannot tell us to stop
    time.sleep(0.5)
  os._exit(1)


def _call(function: Callable[..., Any], task: Any) -> Any:
  return function(task, *_shared)
