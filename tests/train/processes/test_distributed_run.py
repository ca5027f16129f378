"""Two real processes train one sharded model; one is killed, one terminated."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from gdn2_jax.data.pipeline import open_dataset
from gdn2_jax.sharding import MeshConfig
from gdn2_jax.train.checkpoint.meta import committed_steps
from gdn2_jax.train.loop import train
from gdn2_jax.train.report.writer import read_rows
from tests.tiny_run import ROOT
from tests.train.processes.rank import two_process_config
from tests.train.test_loop import Faulty, interrupted

pytestmark = pytest.mark.slow

_CONFIG = """
from tests.train.processes.rank import two_process_config

def get_config():
  return two_process_config({cache_dir!r})
"""


class Gang:
  """`python -m gdn2_jax.launch` with two processes of two devices each."""

  def __init__(self, config_file, workdir):
    self.workdir = workdir
    workdir.mkdir()
    self._process = subprocess.Popen(
      [
        *(sys.executable, "-m", "gdn2_jax.launch"),
        *("--num_processes=2", "--cpu_devices_per_process=2", "--"),
        *(sys.executable, "-m", "tests.train.processes.rank"),
        *(f"--config={config_file}", f"--workdir={workdir}"),
        *("--init_timeout=120", "--heartbeat_timeout=20"),
      ],
      cwd=ROOT,
      env=os.environ
      | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": "."},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  def losses(self, process: int) -> list[tuple[int, str]]:
    """(step, bits) of the steps that a process has finished, in order."""
    path = self.workdir / f"losses-{process}"
    lines = path.read_text().splitlines() if path.exists() else []
    found = [re.fullmatch(r"(\d+) (\S+ \S+)", line) for line in lines]
    return [(int(m[1]), m[2]) for m in found if m]

  def wait_for(self, reached) -> None:
    """Returns once `reached` of the losses of process 0 is true."""
    deadline = time.monotonic() + 200
    while not reached(self.losses(0)):
      if self._process.poll() is not None or time.monotonic() > deadline:
        raise AssertionError(self.end()[1])
      time.sleep(0.01)

  def send(self, process: int, number: signal.Signals) -> None:
    """Sends a signal to one of the two processes."""
    os.kill(int((self.workdir / f"pid-{process}").read_text()), number)

  def end(self) -> tuple[int, str]:
    """Exit code and all output."""
    try:
      out, _ = self._process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
      self._process.kill()
      raise
    return self._process.returncode, out


def compiled_steps(workdir):
  """{file: time of writing} of the training steps in the compilation cache."""
  files = (workdir / ".jax_cache").glob("jit_train_step-*-cache")
  return {path.name: path.stat().st_mtime_ns for path in files}


def by_step(losses):
  """{step: bits}, after checking that a step repeated had the same bits."""
  found = {}
  for step, bits in losses:
    assert found.setdefault(step, bits) == bits, f"step {step} came out new"
  return found


@pytest.fixture(scope="module")
def gang(cache_dir, tmp_path_factory):
  """A run in which process 1 is killed, and after the restart terminated."""
  folder = tmp_path_factory.mktemp("gang")
  (folder / "config.py").write_text(_CONFIG.format(cache_dir=cache_dir))
  gang = Gang(folder / "config.py", folder / "run")
  # Three steps or more are lost, and have to come out the same.
  folder = gang.workdir / "checkpoints"
  gang.wait_for(lambda rows: rows and committed_steps(folder))
  gang.wait_for(lambda rows: rows[-1][0] >= committed_steps(folder)[-1] + 3)
  before = len(gang.losses(0))
  gang.compiled = compiled_steps(gang.workdir)
  gang.send(1, signal.SIGKILL)
  gang.wait_for(lambda rows: len(rows) > before + 5)
  gang.send(1, signal.SIGTERM)
  gang.code, gang.out = gang.end()
  return gang


def test_a_killed_process_costs_a_restart_and_no_bit(gang):
  assert gang.code == 0, gang.out
  assert "process 1 ended with code 137" in gang.out
  # It leaves by itself, unless JAX hears of it first and aborts it.
  left = "process 0: lost another process" in gang.out
  code = 75 if left else 134
  assert f"process 0 ended with code {code}" in gang.out
  assert "starting all again (1 of 10)" in gang.out
  resumed = int(re.search(r"resumed from step (\d+)", gang.out)[1])
  steps = [step for step, _ in gang.losses(0)]
  assert steps.count(resumed + 2) == 2, "nothing was computed twice"
  found = by_step(gang.losses(0))
  assert list(found) == list(range(1, len(found) + 1))


def test_the_restart_finds_the_compiled_step(gang):
  assert len(gang.compiled) == 1
  assert compiled_steps(gang.workdir) == gang.compiled


def test_both_processes_see_the_same_losses(gang):
  losses = [by_step(gang.losses(process)) for process in (0, 1)]
  common = losses[0].keys() & losses[1].keys()
  assert len(common) >= 10
  assert all(losses[0][step] == losses[1][step] for step in common)


def test_sigterm_to_one_process_ends_both_at_one_saved_step(gang):
  assert gang.code == 0, gang.out
  (stopped,) = re.findall(r"preemption notice: saved step (\d+)", gang.out)
  assert committed_steps(gang.workdir / "checkpoints")[-1] == int(stopped)
  for process in (0, 1):
    assert gang.losses(process)[-1][0] == int(stopped)
  # Only the kill before it is reported as a failure.
  assert gang.out.count("ended with code") == 2


def test_one_process_resumes_what_two_have_saved(gang, cache_dir, tmp_path):
  """On another mesh, checked by the digest; the losses agree to 1e-5."""
  workdir = tmp_path / "run"
  shutil.copytree(gang.workdir, workdir)
  for step in committed_steps(workdir / "checkpoints")[1:]:
    shutil.rmtree(workdir / "checkpoints" / str(step))
  config = two_process_config(cache_dir)
  config.mesh = MeshConfig(data=2, fsdp=2, tensor=2)
  lines = []
  data = Faulty(open_dataset(config.data), {8: interrupted})
  stopped = train(config, workdir, dataset=data, say=lines.append)
  assert stopped.step == 9
  assert "resumed from step 4" in lines
  want = by_step(gang.losses(0))
  rows = [
    row for row in read_rows(workdir / "metrics.jsonl") if row["step"] > 4
  ]
  assert [row["step"] for row in rows] == list(range(5, 10))
  for row in rows:
    loss, grad_norm = map(float.fromhex, want[row["step"]].split())
    assert row["loss"] == pytest.approx(loss, rel=1e-5)
    assert row["grad_norm"] == pytest.approx(grad_norm, rel=1e-5)
