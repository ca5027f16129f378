"""Stores of result rows: resume, refusals, damage."""

import json

import pytest

from gdn2_jax.eval.rows import RowStore

SETTINGS = {"samples": 3, "lengths": [512, 1024]}


def test_a_second_run_finds_the_rows_of_the_first(tmp_path):
  with RowStore(tmp_path / "out", SETTINGS) as store:
    store.add("a", {"score": 1.5})
    store.add("b", {"score": 2})
  with RowStore(tmp_path / "out", SETTINGS) as store:
    assert "a" in store and "c" not in store and len(store) == 2
    store.add("c", {"score": None})
    assert list(store.rows()) == [
      {"key": "a", "score": 1.5},
      {"key": "b", "score": 2},
      {"key": "c", "score": None},
    ]


def test_without_a_folder_rows_stay_in_memory():
  with RowStore(None, SETTINGS) as store:
    store.add("a", {"depths": (1, 2)})
    assert list(store.rows()) == [{"key": "a", "depths": [1, 2]}]


def test_a_row_is_readable_before_the_store_is_closed(tmp_path):
  with RowStore(tmp_path, SETTINGS) as store:
    store.add("a", {})
    line = (tmp_path / "rows.jsonl").read_text()
  assert json.loads(line) == {"key": "a"}


@pytest.mark.parametrize("cut", [1, 20, 5000])
def test_an_unfinished_line_is_removed(tmp_path, cut):
  with RowStore(tmp_path, SETTINGS) as store:
    store.add("a", {})
    store.add("b", {"text": "x" * 9000})
  file = tmp_path / "rows.jsonl"
  file.write_bytes(file.read_bytes()[:-cut])
  with RowStore(tmp_path, SETTINGS) as store:
    assert "a" in store and "b" not in store
    store.add("b", {"text": "y"})
  with RowStore(tmp_path, SETTINGS) as store:
    assert [row["key"] for row in store.rows()] == ["a", "b"]


def test_a_damaged_line_is_named(tmp_path):
  with RowStore(tmp_path, SETTINGS) as store:
    store.add("a", {})
    store.add("b", {})
  file = tmp_path / "rows.jsonl"
  file.write_bytes(b"{}\n" + file.read_bytes())
  with pytest.raises(ValueError, match="line 1 is damaged"):
    RowStore(tmp_path, SETTINGS)


def test_other_settings_are_refused_by_name(tmp_path):
  RowStore(tmp_path, SETTINGS).close()
  with pytest.raises(ValueError, match=r"samples=3, now samples=4"):
    RowStore(tmp_path, SETTINGS | {"samples": 4})
  with pytest.raises(ValueError, match=r"essays=None, now essays='a'"):
    RowStore(tmp_path, SETTINGS | {"essays": "a"})
  (tmp_path / "settings.json").write_text("[")
  with pytest.raises(ValueError, match=r"settings\.json: damaged"):
    RowStore(tmp_path, SETTINGS)


def test_rows_without_settings_are_refused(tmp_path):
  with RowStore(tmp_path, SETTINGS) as store:
    store.add("a", {})
  (tmp_path / "settings.json").unlink()
  with pytest.raises(ValueError, match=r"has rows\.jsonl but no settings"):
    RowStore(tmp_path, SETTINGS)
  # A process that was killed before it wrote anything leaves no rows.
  (tmp_path / "rows.jsonl").write_text("")
  RowStore(tmp_path, SETTINGS).close()


def test_only_one_process_writes(tmp_path):
  with RowStore(tmp_path, SETTINGS):
    with pytest.raises(ValueError, match="another process"):
      RowStore(tmp_path, SETTINGS)
  RowStore(tmp_path, SETTINGS).close()


def test_a_row_is_refused_twice_or_with_nan(tmp_path):
  with RowStore(tmp_path, SETTINGS) as store:
    store.add("a", {})
    with pytest.raises(ValueError, match="'a'"):
      store.add("a", {})
    with pytest.raises(ValueError, match="JSON"):
      store.add("b", {"score": float("nan")})
    assert "b" not in store
