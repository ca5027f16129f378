"""The benchmark of waits: what it counts and refuses."""

import json
import types

import pytest

from gdn2_jax.bench import pieces


def flags(**changes):
  """The flags as absl leaves them."""
  values = {
    "prompt_tokens": 40,
    "slots": 2,
    "pieces": ["16"],
    "rounds": 2,
    "json": None,
  }
  return types.SimpleNamespace(**(values | changes))


@pytest.mark.slow
def test_every_size_has_times_of_idle_and_of_reading(tmp_path, capsys):
  path = tmp_path / "pieces.json"
  pieces.main(flags(pieces=["16", "32"], json=str(path)))
  result = json.loads(path.read_text())
  assert [row["piece"] for row in result["results"]] == [16, 32]
  for row in result["results"]:
    assert row["ratio"] == row["reading_p99_s"] / row["idle_p99_s"] > 0
    idle, reading = row["tokens"]
    assert idle > 0 and reading > 0
  # 39 tokens are read before the last one: 3 pieces of 16, 2 of 32.
  assert result["results"][0]["tokens"][1] > result["results"][1]["tokens"][1]
  out = capsys.readouterr().out
  assert "piece   16" in out and "piece   32" in out


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"pieces": ["x"]}, "--pieces=x: expected numbers"),
    ({"pieces": ["0"]}, "--pieces=0: expected numbers"),
    ({"slots": 1}, "--slots=1: expected >= 2"),
    ({"rounds": 0}, "--rounds=0: expected >= 1"),
  ],
)
def test_bad_flags_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    pieces.main(flags(**changes))
