"""The loop of a cell, shards, and the command that is killed and resumed."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from gdn2_jax.eval.synthetic.rows import read_rows
from gdn2_jax.replicate import run
from gdn2_jax.replicate.language import language_runs
from gdn2_jax.replicate.plan import BUDGETS, rehearsal
from gdn2_jax.replicate.run import run_cell, shard_of
from gdn2_jax.replicate.workers import remaining_runs
from tests.replicate.made_up import FACTS, made_up_row

BUDGET = dataclasses.replace(BUDGETS["ci"], lrs=(1e-2, 2e-2, 4e-2), seeds=3)


class MadeUpProgram:
  """Programs whose accuracy is the rate, and that may be killed."""

  ran, dies_after = [], None

  def __init__(self, cell, width):
    self.cell, self.width = cell, width

  def run(self, seeds, lrs, on_point):
    if len(self.ran) == self.dies_after:
      raise KeyboardInterrupt
    self.ran.append(list(zip(seeds, lrs, strict=True)))
    return [{"seed": s, "lr": lr} for s, lr in self.ran[-1]]


@pytest.fixture
def made_up(monkeypatch):
  def row(cell, outcome, role, facts):
    acc = min(outcome["lr"], 2e-2)
    return made_up_row(cell, outcome["seed"], outcome["lr"], acc, role)

  monkeypatch.setattr(MadeUpProgram, "ran", [])
  monkeypatch.setattr(run, "Program", MadeUpProgram)
  monkeypatch.setattr(run, "_facts", lambda program: FACTS)
  monkeypatch.setattr(run, "row_of", row)
  return MadeUpProgram


def test_a_cell_is_tuned_and_reported_and_resumed(
  tmp_path, made_up, monkeypatch
):
  path, cell = tmp_path / "runs.jsonl", BUDGET.cells()[0]
  monkeypatch.setattr(made_up, "dies_after", 2)
  with pytest.raises(KeyboardInterrupt):
    run_cell(cell, BUDGET, path, lambda *_: None)
  assert made_up.ran == [[(100, 1e-2), (100, 2e-2)], [(100, 4e-2)]]
  monkeypatch.setattr(made_up, "dies_after", None)
  run_cell(cell, BUDGET, path, lambda *_: None)
  # 2e-2 and 4e-2 are equally good: the larger is taken.
  assert made_up.ran[2:] == [[(0, 4e-2), (1, 4e-2)], [(2, 4e-2)]]
  run_cell(cell, BUDGET, path, lambda *_: None)
  assert len(made_up.ran) == 4
  roles = [row["role"] for row in read_rows(path)]
  assert roles == ["tune"] * 3 + ["report"] * 3


def test_shards_make_up_the_plan_and_merge_to_it(tmp_path, made_up):
  budget = dataclasses.replace(BUDGETS["cpu"], width=50, extensions=0, seeds=2)
  names = ("gdn2", "kda", "gdn", "deltanet", "no_erase")
  cells = budget.cells(names)
  merged = b""
  for i in (1, 2, 3, 4):
    path = tmp_path / f"{i}.jsonl"
    for cell in shard_of(cells, i, 4):
      run_cell(cell, budget, path, lambda *_: None)
    merged += path.read_bytes()
  (tmp_path / "all.jsonl").write_bytes(merged)
  rows = read_rows(tmp_path / "all.jsonl")
  assert len(rows) == len(cells) * (3 + budget.seeds)
  assert remaining_runs(cells, budget, rows) == 0
  assert remaining_runs(cells, budget, rows[:-4]) == 4


def test_plans_name_only_what_they_run():
  with pytest.raises(ValueError, match="mixers='kda': expected some of"):
    BUDGETS["ci"].cells(("kda",))
  for budget in BUDGETS.values():
    small = rehearsal(budget)
    assert {type(e.task) for e in small.experiments} == {
      type(e.task) for e in budget.experiments
    }
    lrs = budget.lrs
    assert all(b == 2 * a for a, b in itertools.pairwise(lrs))


def test_language_models_of_a_budget():
  assert language_runs("") == []
  with pytest.raises(ValueError, match="--data is missing: expected a folder"):
    language_runs("gpuday")
  runs = language_runs("gpuday", data="rows")
  assert len(runs) == 8 * 3 + 3 * 2
  assert len({r.key for r in runs}) == len({r.name for r in runs}) == len(runs)
  small = language_runs("gpuday", rehearse=True)
  assert {r.mixer for r in small} == {r.mixer for r in runs}


def command(out, *flags):
  return [
    *(sys.executable, "-m", "gdn2_jax.replicate", "--budget=ci"),
    *(f"--out={out}", *flags),
  ]


@pytest.fixture(scope="module")
def env(tmp_path_factory):
  """Programs compile fast rather than run fast, and each of them once."""
  return {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("programs")),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
  }


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--shard=3/2", "--shard=3/2: expected i/n"),
    pytest.param("--mixers=x", "mixers='x': expected", marks=pytest.mark.deep),
    pytest.param("--report", "none of 0 rows belongs", marks=pytest.mark.deep),
  ],
)
def test_bad_flags_are_refused(tmp_path, env, flag, message):
  done = subprocess.run(
    command(tmp_path, flag), capture_output=True, text=True, env=env
  )
  assert done.returncode == 1 and message in done.stderr
  assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.deep
@pytest.mark.slow
def test_a_killed_command_loses_and_repeats_nothing(tmp_path, env):
  flags = ["--workers=2"]
  path = tmp_path / "runs.jsonl"
  process = subprocess.Popen(command(tmp_path, *flags), env=env)
  deadline = time.monotonic() + 300
  while not (path.exists() and path.read_bytes().count(b"\n") >= 2):
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.1)
  process.send_signal(signal.SIGKILL)
  process.wait()
  time.sleep(2)  # workers notice at their next point
  before = path.read_bytes()
  complete = before[: before.rfind(b"\n") + 1]
  path.write_bytes(complete + b'{"suite": "synth')
  subprocess.run(command(tmp_path, *flags), env=env, check=True)
  after = path.read_bytes()
  assert after.startswith(complete)
  rows = [json.loads(line) for line in after.splitlines()]
  assert len(rows) == len({row["key"] for row in rows}) == 8
  assert sorted(row["role"] for row in rows) == ["report"] * 4 + ["tune"] * 4
  assert (tmp_path / "claims.md").exists()


@pytest.mark.deep
@pytest.mark.slow
def test_rehearsal_of_the_gpu_budget(tmp_path, env):
  flags = ["--budget=gpu15", "--rehearse", "--workers=2", "--minutes=20"]
  subprocess.run(command(tmp_path, *flags), env=env, check=True)
  suites = [row["suite"] for row in read_rows(tmp_path / "runs.jsonl")]
  assert suites.count("language") == 2 and suites.count("synthetic") == 4 * 4
