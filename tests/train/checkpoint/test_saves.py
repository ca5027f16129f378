"""Saves that fail, take long, or have nowhere to go."""

import contextlib
import os
import pathlib
import shutil
import tempfile
import threading
import time

import pytest

from gdn2_jax.train.checkpoint.meta import SaveError, committed_steps
from gdn2_jax.train.report.writer import probe
from tests.faults.inject import install
from tests.train.states import SmallRun, make_state, no_file_larger_than

# What orbax leaves behind is tidied up, but not always in time.
pytestmark = [
  pytest.mark.usefixtures("frozen_heap"),
  pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def run(tmp_path, config):
  return SmallRun(tmp_path / "checkpoints", config)


@pytest.fixture
def faults(monkeypatch):
  """Installs faults of os.rename; takes them away at the end."""
  monkeypatch.setattr(os, "rename", os.rename)
  monkeypatch.setattr(os, "replace", os.replace)
  monkeypatch.setattr(shutil, "rmtree", shutil.rmtree)
  return install


def save(checkpointer, run, *steps):
  for step in steps:
    checkpointer.save(step, make_state(step), run.meta)


def leftovers(run):
  return [p.name for p in run.directory.glob("*tmp*")]


def test_training_goes_on_when_a_save_fails(run):
  """The disk is full once; the space comes back and so do the saves."""
  checkpointer = run.checkpointer()
  save(checkpointer, run, 1)
  checkpointer.wait()
  with no_file_larger_than(1 << 13):
    save(checkpointer, run, 2)
    with pytest.raises(SaveError, match="step 2 could not be written"):
      checkpointer.wait()
  assert checkpointer.latest_step() == 1
  (line,) = run.lines
  assert line.startswith("WARNING: checkpoint of step 2 could not be written")
  assert "1 in a row" in line and "newest complete one is of step 1" in line
  assert leftovers(run) == []
  save(checkpointer, run, 3, 4)
  checkpointer.close()
  assert committed_steps(run.directory) == [1, 3, 4]
  assert run.resume() == 4
  assert run.resume(restore_step=1) == 1


def test_failures_in_a_row_end_the_run(run, faults):
  checkpointer = run.checkpointer(max_failed_saves=2)
  save(checkpointer, run, 1)
  checkpointer.wait()
  faults({"full_disk": ["1"]})
  # Each is known to have failed when the next one begins.
  save(checkpointer, run, 2, 3)
  with pytest.raises(SaveError, match=r"step 3 .*2 in a row.*No space left"):
    save(checkpointer, run, 4)
  with pytest.raises(SaveError):
    checkpointer.close()
  assert committed_steps(run.directory) == [1]
  assert len(run.lines) == 1


def test_a_good_save_forgives_the_failed_ones(run, monkeypatch):
  rename, full = os.rename, threading.Event()

  def sometimes(source, target, **kwargs):
    if full.is_set() and "checkpoint-tmp" in str(source):
      raise OSError(28, "No space left on device")
    rename(source, target, **kwargs)

  monkeypatch.setattr(os, "rename", sometimes)
  checkpointer = run.checkpointer(max_failed_saves=2)
  for step in range(1, 7):
    (full.set if step % 2 else full.clear)()
    save(checkpointer, run, step)
    with contextlib.suppress(SaveError):
      checkpointer.wait()
  checkpointer.close()
  assert committed_steps(run.directory) == [2, 4, 6]
  assert len(run.lines) == 3


def test_directory_vanishes_while_training(run):
  checkpointer = run.checkpointer(max_failed_saves=2)
  save(checkpointer, run, 1)
  checkpointer.wait()
  shutil.rmtree(run.directory)
  run.directory.write_text("somebody put a file here")
  with pytest.raises(SaveError, match="the newest complete one is none"):
    save(checkpointer, run, 2, 3, 4)
  with pytest.raises(SaveError):
    checkpointer.close()


def test_slow_saves_do_not_overlap_and_none_is_dropped(run, monkeypatch):
  """Saves take longer than the steps between them."""
  rename, busy, spans = os.rename, threading.Lock(), []

  def slowly(source, target, **kwargs):
    # The arrays of a save and the save itself each come by here.
    if "checkpoint-tmp" in str(source) and str(target)[-1].isdigit():
      assert busy.acquire(blocking=False), "two saves at once"
      time.sleep(0.25)
      busy.release()
      spans.append(str(target))
    rename(source, target, **kwargs)

  monkeypatch.setattr(os, "rename", slowly)
  checkpointer = run.checkpointer(keep=9)
  for step in range(1, 6):
    save(checkpointer, run, step)
    assert checkpointer.latest_step() in (step - 1 or None, step)
  checkpointer.close()
  assert committed_steps(run.directory) == [1, 2, 3, 4, 5]
  assert len(spans) == 5


def test_the_clock_may_jump(run, monkeypatch):
  """A save under way may take it for a time-out; it is made up for."""
  now, jump = time.time, [0.0]
  monkeypatch.setattr(time, "time", lambda: now() + jump[0])
  checkpointer = run.checkpointer(keep=9)
  for step, jump[0] in enumerate((0.0, -7200.0, 86400.0), 1):
    save(checkpointer, run, step)
  jump[0] = -86400.0
  checkpointer.finish(3, make_state(3), run.meta)
  checkpointer.close()
  assert committed_steps(run.directory)[-1] == 3
  assert leftovers(run) == []
  assert run.resume() == 3


def test_the_last_save_is_tried_again(run, monkeypatch):
  rename, calls = os.rename, []

  def once(source, target, **kwargs):
    if str(target).endswith("/7"):
      calls.append(target)
      if len(calls) == 1:
        raise OSError(5, "Input/output error")
    rename(source, target, **kwargs)

  monkeypatch.setattr(os, "rename", once)
  checkpointer = run.checkpointer()
  save(checkpointer, run, 7)
  checkpointer.finish(7, make_state(7), run.meta)
  checkpointer.close()
  assert run.resume() == 7
  assert len(calls) == 2


@contextlib.contextmanager
def ordinary_user():
  """Permissions mean nothing to root."""
  root = os.geteuid() == 0
  if root:
    os.seteuid(65534)
  try:
    yield
  finally:
    if root:
      os.seteuid(0)


@pytest.fixture
def shared():
  """A directory that other users can enter, unlike those of pytest."""
  path = tempfile.mkdtemp()
  os.chmod(path, 0o777)
  yield path
  shutil.rmtree(path)


@pytest.mark.parametrize("name", ["run", "run/checkpoints"])
def test_read_only_directories_are_found_at_the_start(shared, name):
  workdir = pathlib.Path(shared, "run")
  with ordinary_user():
    (workdir / "checkpoints").mkdir(parents=True)
    probe(workdir)
    os.chmod(os.path.join(shared, name), 0o555)
    with pytest.raises(ValueError, match=rf"{name}: cannot write there"):
      probe(workdir)
  assert not list(workdir.rglob(".probe*"))


def test_checkpoints_on_a_disk_that_is_gone(tmp_path):
  (tmp_path / "checkpoints").symlink_to(tmp_path / "not mounted")
  with pytest.raises(ValueError, match="checkpoints: cannot write there"):
    probe(tmp_path)
