"""One run per workdir, also after a crash and across machines."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from gdn2_jax.train.processes import lock as lock_lib
from gdn2_jax.train.processes.lock import LockedError, WorkdirLock

_HOLD = """
import sys, time
from gdn2_jax.train.processes.lock import WorkdirLock
lock = WorkdirLock(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


def test_second_run_is_refused_until_the_first_ends(tmp_path):
  with WorkdirLock(tmp_path):
    with pytest.raises(LockedError, match=rf"process {os.getpid()} on host "):
      WorkdirLock(tmp_path)
  with WorkdirLock(tmp_path) as lock:
    lock.release()
  WorkdirLock(tmp_path).release()


def test_killed_holder_leaves_no_lock(tmp_path):
  holder = subprocess.Popen(
    [sys.executable, "-c", _HOLD, str(tmp_path)],
    stdout=subprocess.PIPE,
    text=True,
  )
  with holder:
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(LockedError, match=f"process {holder.pid} on host"):
      WorkdirLock(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
  WorkdirLock(tmp_path).release()


def test_foreign_lock_is_respected_until_it_is_stale(tmp_path):
  path = tmp_path / ".lock"
  path.write_text(json.dumps({"host": "elsewhere", "pid": 7}))
  with pytest.raises(LockedError, match=r"process 7 on host elsewhere.*after"):
    WorkdirLock(tmp_path)
  # A refused attempt must not look like a sign of life of the holder.
  assert json.loads(path.read_text())["host"] == "elsewhere"
  old = time.time() - lock_lib.STALE_SECONDS - 1
  os.utime(path, (old, old))
  with WorkdirLock(tmp_path):
    assert json.loads(path.read_text())["pid"] == os.getpid()


def test_beat_renews_the_time_stamp(tmp_path, monkeypatch):
  path = tmp_path / ".lock"
  with WorkdirLock(tmp_path) as lock:
    os.utime(path, (1.0, 1.0))
    lock.beat()
    assert path.stat().st_mtime == 1.0  # too early to be worth a write
    monkeypatch.setattr(lock_lib, "_BEAT_SECONDS", 0.0)
    lock.beat()
    assert time.time() - path.stat().st_mtime < 60


def test_garbage_in_the_file_is_no_holder(tmp_path):
  (tmp_path / ".lock").write_text("{ not json")
  WorkdirLock(tmp_path).release()
