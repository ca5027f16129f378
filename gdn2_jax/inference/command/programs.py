"""Compiled programs of a command, kept on disk between starts."""

import contextlib
import os
import pathlib
import threading

import jax

from gdn2_jax.inference.command.printer import Output

_EVENT = "/jax/compilation_cache/"


def use_cache(workdir: str | None) -> str | None:
  """Makes JAX keep compiled programs; call before anything is compiled.

  They are in the cache that the user named, else in that of the training run
  (WORKDIR/.jax_cache), else in the user's cache folder.

  Args:
    workdir: training run, if any.

  Returns:
    None, or the reason for which nothing is kept.
  """
  # By default programs that compile in under a second are compiled again.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  if jax.config.jax_compilation_cache_dir:
    return None
  folder = pathlib.Path(workdir or "") / ".jax_cache"
  if not workdir or not folder.is_dir():
    try:
      folder = _private(_user_cache())
    except (OSError, RuntimeError, ValueError) as e:  # RuntimeError: no home
      return f"compiled programs are not kept: {e}"
  jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
  return None


def _user_cache() -> pathlib.Path:
  cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(cache) / "gdn2_jax" / "jax"


def _private(folder: pathlib.Path) -> pathlib.Path:
  """Makes a folder that nobody else can write to.

  Raises:
    OSError: it cannot be made.
    ValueError: others own it or may write to it.
  """
  folder.mkdir(mode=0o700, parents=True, exist_ok=True)
  found = folder.stat()
  # It holds executables.
  if found.st_uid != os.getuid() or found.st_mode & 0o022:
    raise ValueError(f"{folder}: other users may write to it")
  return folder


class CompilingNote(contextlib.AbstractContextManager):
  """Prints one line if programs are compiled that are not in the cache.

  Args:
    err: stream that gets the line.
    delay: seconds after which a program counts as being compiled; one from the
      cache arrives sooner.
  """

  def __init__(self, err: Output, delay: float = 0.3):
    self._err, self._delay = err, delay
    self._timer: threading.Timer | None = None
    self._shown = False

  def __enter__(self) -> "CompilingNote":
    jax.monitoring.register_event_listener(self._listen)
    return self

  def _listen(self, event: str, **_) -> None:
    if event == _EVENT + "compile_requests_use_cache":
      self._cancel()
      self._timer = threading.Timer(self._delay, self._show)
      self._timer.daemon = True
      self._timer.start()
    elif event in (_EVENT + "cache_hits", _EVENT + "cache_misses"):
      self._cancel()  # read, or compiled

  def _show(self) -> None:
    if not self._shown:
      self._shown = True
      self._err.write("[compiling]\n")
      self._err.flush()

  def _cancel(self) -> None:
    if self._timer:
      self._timer.cancel()

  def __exit__(self, *_) -> None:
    jax.monitoring.unregister_event_listener(self._listen)
    self._cancel()
