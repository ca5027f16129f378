"""A process that hangs ends; one that works, saves or evaluates does not."""

import subprocess
import sys
import threading
import time

import pytest

from gdn2_jax.train.processes import RETRY
from gdn2_jax.train.processes import watchdog as watchdog_lib
from gdn2_jax.train.processes.watchdog import Watchdog
from tests.tiny_run import ROOT


class Ended:
  """Stands for the end of the process; `after` waits for it."""

  def __init__(self):
    self._event = threading.Event()
    self.message = ""

  def __call__(self, message):
    self.message = message
    self._event.set()

  def after(self, seconds):
    return self._event.wait(seconds)


@pytest.fixture
def ended():
  return Ended()


def test_silence_ends_the_process(ended):
  with Watchdog(0.2, ended) as watchdog:
    watchdog.beat()
    start = time.monotonic()
    assert ended.after(60)  # only a watchdog that never acts takes so long
    assert time.monotonic() - start > 0.15
  assert "no progress for 0.2 s (--config.watchdog_seconds=0.2)" in (
    ended.message
  )


def test_beats_keep_it_alive(ended):
  with Watchdog(0.5, ended) as watchdog:
    for _ in range(8):
      watchdog.beat()
      assert not ended.after(0.1)


def test_not_armed_before_the_first_beat(ended):
  """The first step compiles for as long as it likes."""
  with Watchdog(0.05, ended):
    assert not ended.after(0.3)


def test_zero_turns_it_off(ended):
  with Watchdog(0.0, ended) as watchdog:
    watchdog.beat()
    with watchdog.saving(), watchdog.paused():
      assert not ended.after(0.2)


def test_paused_while_evaluating_and_armed_again_after(ended):
  with Watchdog(0.2, ended) as watchdog:
    watchdog.beat()
    with watchdog.paused():
      assert not ended.after(0.5)
    assert ended.after(60)


def test_saves_may_take_longer_but_not_for_ever(ended, monkeypatch):
  monkeypatch.setattr(watchdog_lib, "SAVE_FACTOR", 4.0)
  with Watchdog(0.2, ended) as watchdog:
    watchdog.beat()
    with watchdog.saving():
      assert not ended.after(0.4)
      assert ended.after(60)
  assert "no progress for 0.8 s" in ended.message


def test_close_stops_the_thread(ended):
  watchdog = Watchdog(0.1, ended)
  watchdog.beat()
  watchdog.close()
  assert not ended.after(0.3)
  assert "watchdog" not in [t.name for t in threading.enumerate()]


_STUCK = """
import threading
from gdn2_jax.train.processes.watchdog import Watchdog
Watchdog(0.5).beat()
def hangs_here():
  threading.Event().wait()
hangs_here()
"""


def test_stacks_and_exit_code():
  done = subprocess.run(
    [sys.executable, "-c", _STUCK],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  assert done.returncode == RETRY == 75
  assert "hangs_here" in done.stderr
  assert "no progress for 0.5 s" in done.stderr
