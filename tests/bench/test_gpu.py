"""The GPU benchmark, rehearsed on a CPU, and what it does when things fail."""

import contextlib
import dataclasses
import functools
import json
import pathlib
import re
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.bench.gpu import cases, check, peers
from gdn2_jax.bench.gpu import part as gpu_part
from gdn2_jax.bench.gpu import run as gpu
from gdn2_jax.bench.gpu import table as gpu_table
from gdn2_jax.bench.gpu.names import OURS, PARTS, PEERS
from tests.tiny_run import ROOT, run_module

README = ROOT / "benchmarks" / "README.md"


@pytest.mark.deep
@pytest.mark.slow
def test_rehearsal_runs_every_part():
  before = README.read_text()
  done = run_module("gdn2_jax.bench", "gpu", "--rehearse", "--seconds=480")
  assert done.returncode == 0, done.stdout + done.stderr
  assert "REHEARSAL" in done.stdout and "times mean nothing" in done.stdout
  assert README.read_text() == before
  path = pathlib.Path(done.stdout.split()[-1])
  assert not path.is_relative_to(ROOT)
  assert "REHEARSAL" in (path.parents[1] / "README.md").read_text()
  result = json.loads(path.read_text())
  rows = {row["label"]: row for row in result["rows"]}
  assert {row["part"] for row in rows.values()} == set(PARTS)
  assert set(rows["1x128, mosaic_gpu"]["errors"]) == {
    "o",
    "state",
    *cases.GRADIENTS,
  }
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
    assert set(rows[label]["ms"]) == set(OURS) and not rows[label]["notes"]
    for peer in PEERS:
      assert rows[f"{label}, {peer}"]["part"] == "peers"
      assert rows[f"{label}, {peer}"]["note"].startswith("not run: ")
  for op in ("gated norm", "short conv packed"):
    row = rows[f"forward+backward {op} 1x64"]
    assert set(row["ms"]) == set(OURS) and not row["notes"]
  for label in ("step 32x2", "step 64x1"):
    assert rows[label]["passed"] and rows[label]["tokens_per_s"] > 0


def test_wrong_result_fails():
  exact = (jnp.linspace(-1, 1, 256), jnp.ones(8))
  compare = functools.partial(check.compare, ("o", "state"))
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

  jobs = {"past": fails, "fails": fails, "refuses": refuses}
  recorder.run({label: gpu_part.Job(f) for label, f in jobs.items()})
  rows = gpu._read(recorder.path)
  assert "past" not in rows
  assert rows["fails"]["note"] == "failed: RuntimeError: boom"
  assert rows["fails"]["passed"] is False
  assert rows["refuses"]["note"] == "not run: K = 7"
  assert "passed" not in rows["refuses"]
  monkeypatch.setattr(gpu_part, "_device_works", lambda: False)
  with pytest.raises(SystemExit):
    recorder.run({"lost": gpu_part.Job(fails)})
  late = _recorder(tmp_path, seconds=-1)
  late.run({"late": gpu_part.Job(fails)})
  assert gpu._read(late.path)["late"]["note"] == gpu_part.OUT_OF_TIME


def test_programs_are_compiled_once_and_their_errors_are_rows(tmp_path):
  lowered = []

  def lower():
    lowered.append(1)
    return jax.jit(jnp.sin).lower(1.0)

  def fails():
    raise RuntimeError("boom")

  def measure(*programs):
    return {"sum": sum(float(program()(0.0)) for program in programs)}

  recorder = _recorder(tmp_path)
  jobs = {name: gpu_part.Job(measure, [lower, lower]) for name in "ab"}
  recorder.run(jobs | {"c": gpu_part.Job(measure, [fails])})
  rows = gpu._read(recorder.path)
  assert rows["a"]["sum"] == rows["b"]["sum"] == 0 and len(lowered) == 1
  assert rows["c"]["note"] == "failed: RuntimeError: boom"


def test_a_part_without_its_packages_is_a_note(tmp_path, monkeypatch):
  """A GPU's own JAX may come without flax."""
  monkeypatch.delitem(sys.modules, "gdn2_jax.bench.gpu.step", raising=False)
  monkeypatch.setitem(sys.modules, "gdn2_jax.train.state", None)
  recorder = dataclasses.replace(_recorder(tmp_path), part="step")
  gpu.run_rows(recorder, rehearse=True)
  (row,) = gpu._read(recorder.path).values()
  assert row["label"] == "step" and row["note"].startswith("not run: ")
  assert gpu_table.failures([row]) == []
  assert "| step |" in gpu_table._step([row])


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


def test_peers_say_why_they_are_missing(tmp_path):
  recorder = _recorder(tmp_path)
  peers.run(recorder, rehearse=True)
  rows = gpu._read(recorder.path)
  assert "forward 1x128, fla gdn2" in rows and "decode B=1, fla kda" in rows
  for row in rows.values():
    assert row["note"].startswith("not run: ") and "passed" not in row


@pytest.mark.parametrize("label", PEERS)
@pytest.mark.parametrize("kind", ["forward", "forward+backward", "decode"])
def test_peers_get_our_arrays(label, kind):
  """With NumPy in torch's place: what is called, and with which shapes."""
  calls = []

  class Tensor(np.ndarray):
    def clone(self):
      return self.copy()

    contiguous = detach = clone

    def requires_grad_(self):
      calls.append("gradient")

  def function(*tensors, **options):
    calls.append([x.shape for x in tensors])
    calls.append(sorted(options))
    return tensors[0], tensors[0]

  def grad(outputs, inputs, cotangents):
    calls.append((len(outputs), len(inputs), len(cotangents)))

  torch = types.SimpleNamespace(
    from_dlpack=lambda x: np.asarray(x).view(Tensor),
    no_grad=contextlib.nullcontext,
    autograd=types.SimpleNamespace(grad=grad),
  )
  (case,) = (c for k, c in cases.timed_recurrences(True) if k == kind)
  arguments = case.make()
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(sys.modules, "torch", torch)
    peers.make_call(label, kind, function, *arguments)()
  T = 1 if kind == "decode" else 128
  shapes = 6 * [(1, T, 1, 64)]
  if label == "fla kda":
    shapes = [*shapes[:4], (1, T, 1)]
  options = ["output_final_state"]
  if kind == "decode":
    options.insert(0, "initial_state")
  want = [shapes, options]
  if kind == "forward+backward":
    want = len(shapes) * ["gradient"] + want + [(2, len(shapes), 2)]
  assert calls == want


def test_our_figures_are_on_disk_before_the_peers_run(tmp_path, monkeypatch):
  """Even if the whole benchmark is ended while they run."""

  def supervise(part, deadline, rehearse):
    if part == "peers":
      raise KeyboardInterrupt
    environment = {"label": "environment", "device": "NVIDIA X"}
    row = {"part": part, "label": "a", "note": "not run: no reason"}
    return [environment, row]

  monkeypatch.setattr(gpu, "_supervise", supervise)
  values = types.SimpleNamespace(
    part=None,
    parts=list(PARTS),
    rehearse=False,
    output=str(tmp_path),
    seconds=9.0,
  )
  with pytest.raises(KeyboardInterrupt):
    gpu.main(values)
  result = json.loads((tmp_path / "results" / "gpu_nvidia_x.json").read_text())
  assert [row["part"] for row in result["rows"]] == list(PARTS[:-1])


def test_a_peer_that_hangs_costs_no_figure_and_fails_nothing():
  assert PARTS[-1] == "peers"
  row = {"part": "peers", "label": "forward z, fla kda", "passed": False}
  row["note"] = "failed: no result after 60 s"
  assert gpu_table.failures([row]) == []
  assert gpu_table.failures([row | {"part": "time"}]) != []


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
      "notes": {"xla": "not run: no reason"},
    },
    {
      "part": "peers",
      "label": "forward z, fla gdn2",
      "note": "not run: no torch",
    },
    {
      "part": "peers",
      "label": "forward z, fla kda",
      "ms": {"fla kda": 0.25},
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
  assert "FAILED: 1 of 7 rows\n* check: y: failed: boom" in text
  assert (
    "| forward z | 0.5 | 2 (x4.00) | - | 0.25 (x0.50) | 1000 | 50% |" in text
  )
  assert "* fla gdn2: not run: no torch (forward z)" in text
  assert "* xla: not run: no reason (forward z)" in text
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
