"""Lock of a workdir, for one run at a time.

An flock held for the life of the process stops a second run on the same
machine; the kernel drops it with its holder, even after kill -9. Another
machine may not see flocks, so the file also names host and pid, and its time
stamp is renewed: the lock of another host counts as abandoned once it is
STALE_SECONDS old.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import time

STALE_SECONDS = 300.0
_BEAT_SECONDS = 30.0


class LockedError(ValueError):
  """The workdir belongs to another live run."""


class WorkdirLock(contextlib.AbstractContextManager):
  """Holds WORKDIR/.lock from construction to `release`.

  Raises:
    LockedError: another run holds it; the message names host and pid.
  """

  def __init__(self, workdir: str | os.PathLike):
    self._path = pathlib.Path(workdir) / ".lock"
    # Not truncated on opening: the content still names the other holder.
    self._file = open(self._path, "a+", encoding="ascii")  # noqa: SIM115
    try:
      self._acquire()
    except BaseException:
      self._file.close()
      raise
    self._last_beat = time.monotonic()

  def _acquire(self) -> None:
    self._file.seek(0)
    holder = _parse(self._file.read())
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      raise LockedError(self._message(holder)) from e
    age = time.time() - os.fstat(self._file.fileno()).st_mtime
    foreign = holder and holder["host"] != socket.gethostname()
    if foreign and age < STALE_SECONDS:
      raise LockedError(
        self._message(holder)
        + f" (last sign of life {age:.0f} s ago; after {STALE_SECONDS:.0f} s "
        "it counts as abandoned)"
      )
    self._file.truncate(0)
    json.dump({"host": socket.gethostname(), "pid": os.getpid()}, self._file)
    self._file.flush()
    os.fsync(self._file.fileno())

  def _message(self, holder: dict | None) -> str:
    who = "another run"
    if holder:
      who = f"process {holder['pid']} on host {holder['host']}"
    return (
      f"--workdir={self._path.parent}: in use by {who}; stop it first, or "
      f"remove {self._path} if it is certainly gone"
    )

  def beat(self) -> None:
    """Renews the time stamp, at most every half minute."""
    now = time.monotonic()
    if now - self._last_beat >= _BEAT_SECONDS:
      os.utime(self._file.fileno())
      self._last_beat = now

  def release(self) -> None:
    """Releases the lock; a second call has no effect."""
    if not self._file.closed:
      # Emptied, not unlinked: a waiting opener may already hold this inode.
      self._file.truncate(0)
      self._file.close()

  def __exit__(self, *_) -> None:
    self.release()


def _parse(text: str) -> dict | None:
  with contextlib.suppress(ValueError):
    holder = json.loads(text)
    if isinstance(holder, dict) and {"host", "pid"} <= set(holder):
      return holder
  return None
