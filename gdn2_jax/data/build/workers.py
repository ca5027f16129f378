"""Processes that work through tasks and never outlive whoever started them."""

import concurrent.futures
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

# Set once per worker process, so that tasks stay small.
_shared: tuple[Any, ...] = ()


class Workers:
  """Runs `function(task, *shared)` for many tasks.

  Args:
    count: processes; 0 runs in the caller's.
    shared: further arguments of every call, sent once to each process.
  """

  def __init__(self, count: int, *shared: Any):
    self._count = count
    self._shared = shared
    self._pool: concurrent.futures.ProcessPoolExecutor | None = None
    self._others: list[Any] = []

  def __enter__(self) -> "Workers":
    if self._count:
      self._others = multiprocessing.active_children()
      self._pool = concurrent.futures.ProcessPoolExecutor(
        self._count,
        # A fork would copy threads of the tokenizer in an unknown state.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_initialize,
        initargs=(os.getpid(), self._shared),
      )
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    if self._pool is None:
      return
    if kind is not None:  # a task half done is done again by the next build
      for child in multiprocessing.active_children():
        if child not in self._others:
          child.kill()
    self._pool.shutdown(cancel_futures=True)

  def run(
    self, function: Callable[..., Any], tasks: Iterable[Any]
  ) -> Iterator[tuple[Any, Any]]:
    """(task, result) pairs as they finish.

    Raises:
      RuntimeError: if a worker process died, for example for want of memory.
      Exception: the first one that a task raised.
    """
    if self._pool is None:
      for task in tasks:
        yield task, function(task, *self._shared)
      return
    waiting: dict[concurrent.futures.Future, Any] = {}
    left = iter(tasks)
    try:
      while True:
        for task in left:
          waiting[self._pool.submit(_call, function, task)] = task
          if len(waiting) >= 2 * self._count:
            break
        if not waiting:
          return
        done, _ = concurrent.futures.wait(
          waiting, return_when=concurrent.futures.FIRST_COMPLETED
        )
        for future in done:
          yield waiting.pop(future), future.result()
    except BrokenProcessPool as error:
      raise RuntimeError(
        "a worker process died; is there memory for"
        f" {self._count} of them? (fewer: --workers)"
      ) from error
    finally:
      for future in waiting:
        future.cancel()


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
