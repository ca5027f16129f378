"""Flags: token, hosts, limits."""

import re

import pytest
from absl.testing import flagsaver

from gdn2_jax.serve import flags
from gdn2_jax.serve.limits import Limits


@pytest.fixture(autouse=True)
def parsed():
  if not flags.flags.FLAGS.is_parsed():
    flags.flags.FLAGS(["test"])
  with flagsaver.flagsaver():
    yield


def test_the_defaults_are_those_of_the_limits():
  assert flags.read_limits() == Limits()
  assert flags.read_token() == (None, False)
  hosts = flags.allowed_hosts()
  assert hosts == {"localhost", "127.0.0.1", "[::1]"}


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("max_prompt_tokens", 0),
    ("max_output_tokens", -1),
    ("max_body_bytes", 0),
    ("max_concurrent", 0),
    ("request_timeout", 0.0),
    ("request_timeout", float("nan")),
    ("stop_timeout", -1.0),
    ("max_sessions", -1),
    ("slots", 0),
    ("prefill_piece", 0),
    ("port", 65536),
  ],
)
def test_a_flag_outside_its_range_is_refused_by_name(name, value):
  with flagsaver.flagsaver(**{name: value}):
    with pytest.raises(ValueError, match=f"^--{name}={value}: expected "):
      flags.read_limits()


@pytest.mark.parametrize(
  ("host", "loopback"),
  [
    ("127.0.0.1", True),
    ("127.9.9.9", True),
    ("::1", True),
    ("localhost", True),
    ("0.0.0.0", False),
    ("::", False),
    ("10.0.0.1", False),
    ("example.org", False),
  ],
)
def test_a_token_is_needed_where_other_machines_reach_it(host, loopback):
  with flagsaver.flagsaver(host=host):
    token, new = flags.read_token()
    assert new is not loopback and (token is None) is loopback
    assert (flags.allowed_hosts() is None) is not loopback
    if new:
      assert len(token) >= 32 and token != flags.read_token()[0]


def test_a_token_file_has_one_token(tmp_path):
  file = tmp_path / "token"
  with flagsaver.flagsaver(token_file=str(file), host="0.0.0.0"):
    where = re.escape(f"--token_file={file}: expected ")
    with pytest.raises(ValueError, match=where + "a file with a token"):
      flags.read_token()
    for bad in ("", "short", "two words of a token", "a" * 20 + "\n" + "b"):
      file.write_text(bad)
      with pytest.raises(ValueError, match=where + "one line of at least 16"):
        flags.read_token()
    file.write_bytes(b"\xff" * 20)
    with pytest.raises(ValueError, match="not ASCII"):
      flags.read_token()
    file.write_text("0123456789abcdef\n")
    assert flags.read_token() == ("0123456789abcdef", False)
