"""The cache of compiled programs, and the note while one is compiled."""

import io
import time

import jax
import pytest

from gdn2_jax.inference.command.programs import CompilingNote, use_cache

EVENT = "/jax/compilation_cache/"


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
  names = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
  )
  old = {name: getattr(jax.config, name) for name in names}
  jax.config.update("jax_compilation_cache_dir", None)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  yield tmp_path / "cache" / "gdn2_jax" / "jax"
  for name, value in old.items():
    jax.config.update(name, value)


def test_the_cache_of_the_user_is_private(no_cache):
  assert use_cache(None) is None
  assert no_cache.stat().st_mode & 0o777 == 0o700
  assert jax.config.jax_compilation_cache_dir == str(no_cache)
  assert jax.config.jax_persistent_cache_min_compile_time_secs == 0


def test_a_cache_that_others_may_write_to_is_not_used(no_cache):
  no_cache.mkdir(parents=True)
  no_cache.chmod(0o777)
  assert "other users may write to it" in use_cache(None)
  assert jax.config.jax_compilation_cache_dir is None


def test_a_run_has_its_own_cache_if_it_made_one(no_cache, tmp_path):
  assert use_cache(str(tmp_path)) is None
  assert jax.config.jax_compilation_cache_dir == str(no_cache)
  jax.config.update("jax_compilation_cache_dir", None)
  (tmp_path / ".jax_cache").mkdir()
  assert use_cache(str(tmp_path)) is None
  own = str(tmp_path / ".jax_cache")
  assert jax.config.jax_compilation_cache_dir == own
  # One that the user named goes first.
  assert use_cache(None) is None
  assert jax.config.jax_compilation_cache_dir == own


def test_the_note_comes_once_and_only_for_compiling():
  err = io.StringIO()
  with CompilingNote(err, delay=30.0):
    jax.monitoring.record_event(EVENT + "compile_requests_use_cache")
    jax.monitoring.record_event(EVENT + "cache_hits")
  assert err.getvalue() == ""
  with CompilingNote(err, delay=0.0):
    for _ in range(3):
      jax.monitoring.record_event(EVENT + "compile_requests_use_cache")
      deadline = time.monotonic() + 30
      while not err.getvalue() and time.monotonic() < deadline:
        time.sleep(0.01)
      jax.monitoring.record_event(EVENT + "cache_misses")
  assert err.getvalue() == "[compiling]\n"
  with CompilingNote(err, delay=0.0):
    pass
  jax.monitoring.record_event(EVENT + "compile_requests_use_cache")
  assert err.getvalue() == "[compiling]\n"
