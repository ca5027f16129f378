"""The GPU benchmark, rehearsed on a CPU, and what it does when things fail."""

import functools
import json
import pathlib
import re
import time

import jax.numpy as jnp
import pytest

from gdn2_jax.bench.gpu import check as gpu_check
from gdn2_jax.bench.gpu import errors, peers
from gdn2_jax.bench.gpu import part as gpu_part
from gdn2_jax.bench.gpu import run as gpu
from gdn2_jax.bench.gpu import table as gpu_table
from gdn2_jax.bench.gpu.names import COLUMNS, PARTS
from tests.tiny_run import ROOT, run_module

README = ROOT / "benchmarks" / "README.md"


def test_rehearsal_runs_every_part():
  before = README.read_text()
  done = run_module("gdn2_jax.bench", "gpu", "--rehearse", "--seconds=280")
  assert done.returncode == 0, done.stdout + done.stderr
  assert "REHEARSAL" in done.stdout and "times mean nothing" in done.stdout
  assert README.read_text() == before
  path = pathlib.Path(done.stdout.split()[-1])
  assert not path.is_relative_to(ROOT)
  assert "REHEARSAL" in (path.parents[1] / "README.md").read_text()
  result = json.loads(path.read_text())
  rows = {row["label"]: row for row in result["rows"]}
  assert {row["part"] for row in rows.values()} == set(PARTS)
  assert set(rows["1x128, mosaic_gpu"]["errors"]) == set(gpu_check.NAMES)
  for label in (
    "1x128",
    "step B=1",
    "gated norm 1x64",
    "short conv packed 1x64",
    "attention packed 1x64",
  ):
    assert rows[f"{label}, mosaic_gpu"]["passed"]
  assert rows["xla itself, xla"]["passed"]
  assert rows["step B=1, triton"]["note"].startswith("not run: ")
  for label in ("forward 1x128", "forward+backward 1x128", "decode B=1"):
    row = rows[label]
    assert set(row["ms"]) | set(row["notes"]) == set(COLUMNS)
    assert {"mosaic_gpu", "xla"} <= set(row["ms"])
  for op in ("gated norm", "short conv packed"):
    row = rows[f"forward+backward {op} 1x64"]
    assert set(row["ms"]) == {"mosaic_gpu", "xla"} and not row["notes"]
  for label in ("step 32x2", "step 64x1"):
    assert rows[label]["passed"] and rows[label]["tokens_per_s"] > 0


def test_wrong_result_fails():
  exact = (jnp.linspace(-1, 1, 256), jnp.ones(8))
  compare = functools.partial(errors.compare, ("o", "state"))
  good = compare((exact[0].astype(jnp.bfloat16), exact[1]), exact, "bfloat16")
  assert good["passed"] and good["worst"] == "o"
  assert good["errors"]["o"] == pytest.approx(good["rounding"]["o"])
  assert good["rounding"]["o"] > 1e-4
  assert not compare((exact[0], 1.01 * exact[1]), exact, "bfloat16")["passed"]
  row = compare((exact[0].at[3].set(jnp.nan), exact[1]), exact, "bfloat16")
  assert not row["passed"] and row["errors"]["o"] == "nan"
  assert json.loads(json.dumps(row, allow_nan=False)) == row


def _recorder(tmp_path, seconds=60.0, done=()):
  path = tmp_path / "rows"
  path.touch()
  return gpu_part.Recorder(
    part="check",
    path=path,
    deadline=time.time() + seconds,
    done=frozenset(done),
  )


def test_rows_that_fail_do_not_end_the_part(tmp_path, monkeypatch):
  recorder = _recorder(tmp_path, done=["past"])

  def fails():
    raise RuntimeError("boom\nand more")

  def refuses():
    raise NotImplementedError("K = 7")

  recorder.run("past", fails)
  recorder.run("fails", fails)
  recorder.run("refuses", refuses)
  rows = gpu._read(recorder.path)
  assert "past" not in rows
  assert rows["fails"]["note"] == "failed: RuntimeError: boom"
  assert rows["fails"]["passed"] is False
  assert rows["refuses"]["note"] == "not run: K = 7"
  assert "passed" not in rows["refuses"]
  monkeypatch.setattr(gpu_part, "_device_works", lambda: False)
  with pytest.raises(SystemExit):
    recorder.run("lost", fails)
  late = _recorder(tmp_path, seconds=-1)
  late.run("late", fails)
  assert gpu._read(late.path)["late"]["note"] == gpu_part.OUT_OF_TIME


def test_a_part_that_dies_goes_on_behind_its_row(monkeypatch):
  lives = []

  def watch(part, path, deadline, rehearse):
    done = gpu._read(path)
    lives.append(set(done))
    with path.open("a") as file:
      for label in ("environment", "a", "b", "c"):
        if label in done and label != "environment":
          continue
        row = {"part": part, "label": label}
        file.write(json.dumps(row | {"started": True}) + "\n")
        if label == "b":
          return -11
        file.write(json.dumps(row | {"passed": True}) + "\n")
    return 0

  monkeypatch.setattr(gpu, "_watch", watch)
  rows = gpu._supervise("check", time.time() + 60, False)
  by_label = {row["label"]: row for row in rows}
  assert lives == [set(), {"environment", "a", "b"}]
  assert by_label["b"]["note"] == "failed: its process ended with -11"
  assert [by_label[x]["passed"] for x in "abc"] == [True, False, True]


def test_a_part_that_cannot_start_is_one_failed_row(monkeypatch):
  monkeypatch.setattr(gpu, "_watch", lambda *_: 1)
  (row,) = gpu._supervise("time", time.time() + 60, False)
  assert row["passed"] is False and "ended with 1" in row["note"]


def test_peers_say_why_they_are_missing():
  x = jnp.ones((1, 4, 1, 16))
  with pytest.raises(peers.Missing):
    peers.sequence("fla gdn2", 6 * (x,), None)
  with pytest.raises(peers.Missing):
    peers.step("fla kda", 6 * (x[:, 0],), jnp.ones((1, 1, 16, 16)))


def test_table_says_what_failed_and_what_did_not_run():
  rows = [
    {"part": "check", "label": "x", "note": "not run: no reason"},
    {"part": "check", "label": "y", "note": "failed: boom", "passed": False},
    {"part": "time", "label": "copy", "bytes": 8, "gb_per_s": 2000.0},
    {
      "part": "time",
      "label": "forward z",
      "ms": {"mosaic_gpu": 0.5, "xla": 2.0},
      "gb_per_s": {"mosaic_gpu": 1000.0, "xla": 250.0},
      "notes": {"fla gdn2": "not run: no torch"},
    },
    {
      "part": "step",
      "label": "step 2048x8",
      "note": "out of memory",
      "memory_bytes": 90e9,
    },
  ]
  result = {"rows": rows, "rehearsal": False, "driver": "1", "date": "today"}
  text = gpu_table.tables(result | {"packages": {}})
  assert "FAILED: 1 of 5 rows\n* check: y: failed: boom" in text
  assert "| forward z | 0.5 | 2 (x4.00) | - | - | 1000 | 50% |" in text
  assert "* fla gdn2: not run: no torch (forward z)" in text
  assert re.search(r"step 2048x8 .* 90.0 GB \| out of memory", text)
  assert "REHEARSAL" not in text


def test_readme_has_its_markers_and_no_figure_that_was_not_measured():
  text = README.read_text()
  new = gpu_table.update(text, "42")
  assert gpu_table.update(new, "43") == new.replace("\n42\n", "\n43\n")
  block = text.partition(gpu_table.BEGIN)[2].partition(gpu_table.END)[0]
  results = list((README.parent / "results").glob("gpu_*.json"))
  assert results or block.strip() == "Not yet measured."
  with pytest.raises(ValueError, match="expected the lines"):
    gpu_table.update("no markers", "42")


def test_without_a_gpu_it_says_so():
  done = run_module("gdn2_jax.bench", "gpu", "--parts=check")
  assert done.returncode == 1
  assert "finds no NVIDIA GPU" in done.stderr
