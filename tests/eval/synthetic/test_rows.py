"""Files of rows that grow, break off and are merged."""

import json
import threading

import pytest

from gdn2_jax.eval.synthetic.mixers import Sizes
from gdn2_jax.eval.synthetic.rows import (
  append_rows,
  config_of,
  key_of,
  read_rows,
)
from gdn2_jax.eval.synthetic.tasks import Recall
from gdn2_jax.eval.synthetic.train import Cell, Training


def rows(*keys):
  return [{"key": key, "metrics": {"acc": 0.5}} for key in keys]


def keys_in(path):
  return [row["key"] for row in read_rows(path)]


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_half_a_line_is_ignored_and_removed(tmp_path, cut):
  path = tmp_path / "runs.jsonl"
  append_rows(path, rows("a", "b"))
  path.write_bytes(path.read_bytes()[:-cut])  # killed while it wrote
  assert keys_in(path) == ["a"]
  append_rows(path, rows("b", "c"))
  assert keys_in(path) == ["a", "b", "c"]
  assert len(path.read_text().splitlines()) == 3


def test_half_a_line_alone_is_an_empty_file(tmp_path):
  path = tmp_path / "runs.jsonl"
  path.write_bytes(b'{"key": "x' + b"y" * 200_000)
  assert read_rows(path) == []
  append_rows(path, rows("a"))
  assert path.read_text() == json.dumps(rows("a")[0]) + "\n"


def test_a_key_is_written_and_read_once(tmp_path):
  path, other = tmp_path / "runs.jsonl", tmp_path / "other.jsonl"
  append_rows(path, rows("a", "b"))
  append_rows(path, rows("b", "c"))
  assert len(path.read_text().splitlines()) == 3
  append_rows(other, rows("c", "d"))
  merged = tmp_path / "merged.jsonl"
  merged.write_bytes(path.read_bytes() + other.read_bytes())
  assert keys_in(merged) == ["a", "b", "c", "d"]


def test_a_damaged_line_is_named(tmp_path):
  path = tmp_path / "runs.jsonl"
  path.write_text('{"key": "a"}\n{"key": "b"{"key": "c"}\n{"key": "d"}\n')
  with pytest.raises(ValueError, match=r"runs.jsonl: line 2 is .*expected"):
    read_rows(path)


def test_writers_at_the_same_time_lose_nothing(tmp_path):
  path = tmp_path / "runs.jsonl"

  def write(name):
    for i in range(20):
      append_rows(path, rows(f"{name}{i}", f"shared{i}"))

  threads = [threading.Thread(target=write, args=(n,)) for n in "abcd"]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(path.read_text().splitlines()) == 5 * 20
  assert len(set(keys_in(path))) == 5 * 20


def test_the_key_changes_with_every_part_of_the_config():
  cell = Cell(Recall(4), "gdn2", Sizes(), Training())
  changed = [
    Cell(Recall(5), "gdn2", Sizes(), Training()),
    Cell(Recall(4), "kda", Sizes(), Training()),
    Cell(Recall(4), "gdn2", Sizes(key_dim=32), Training()),
    Cell(Recall(4), "gdn2", Sizes(), Training(steps=12)),
    Cell(Recall(4), "gdn2", Sizes(), Training(), "token"),
  ]
  configs = [config_of(c, 0, 1e-3) for c in (cell, *changed)]
  configs += [config_of(cell, 1, 1e-3), config_of(cell, 0, 2e-3)]
  assert len({key_of(c) for c in configs}) == len(configs)
  assert key_of(config_of(cell, 0, 1e-3)) == key_of(configs[0])
  # Rows of files that exist must be found by later versions.
  assert key_of(json.loads(json.dumps(configs[0]))) == key_of(configs[0])
