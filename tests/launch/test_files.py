"""The launch files parse, and name flags, modules and places that exist."""

import os
import re
import shlex
import subprocess
import sys

import pytest
import yaml

from gdn2_jax.configs import gdn2_1p3b
from gdn2_jax.train.config import preflight
from tests.tiny_run import ROOT

FOLDER = ROOT / "launch"
_FLAG = re.compile(r"(?<![\w-])--([a-z_]+(?:\.[a-z_0-9]+)*)")


@pytest.fixture(scope="module")
def train_flags():
  """Names of the flags of the training program, from its own help."""
  done = subprocess.run(
    [sys.executable, "-m", "gdn2_jax.train", "--help"],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=False,
  )
  # absl writes boolean flags as --[no]name.
  text = done.stdout.replace("[no]", "")
  names = set(_FLAG.findall(text))
  assert {"workdir", "distributed", "config.mesh.fsdp"} <= names
  return names


def check_flags(words, train_flags):
  used = {match[1] for word in words if (match := _FLAG.match(word))}
  assert used and used <= train_flags, used - train_flags


def check_fits(given, devices):
  """The preset's batch splits over the devices, 16K tokens on each at once."""
  config = gdn2_1p3b.get_config()
  config.mesh.fsdp = int(given["config.mesh.fsdp"])
  config.grad_accum = int(given["config.grad_accum"])
  preflight(config, devices)
  rows = config.data.batch_size // config.grad_accum // devices
  assert rows * config.data.seq_len == 16384


def flags_of(words):
  return dict(word[2:].split("=", 1) for word in words if "=" in word)


@pytest.fixture(scope="module")
def batch_script() -> str:
  return (FOLDER / "slurm.sbatch").read_text()


def bash_reads(script: str) -> None:
  done = subprocess.run(
    ["bash", "-n"], input=script, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr


def run_batch(tmp_path, code: int, restarts: int = 0):
  """Runs the batch script where `srun` and `scontrol` are stand-ins."""
  for name, status in (("srun", code), ("scontrol", 0)):
    stub = tmp_path / name
    stub.write_text(f'#!/bin/sh\necho "{name} $*"\nexit {status}\n')
    stub.chmod(0o755)
  return subprocess.run(
    ["bash", str(FOLDER / "slurm.sbatch"), "--config=a.py", "--workdir=/r/a b"],
    env=os.environ
    | {
      "PATH": f"{tmp_path}:{os.environ['PATH']}",
      "SLURM_JOB_ID": "7",
      "SLURM_RESTART_COUNT": str(restarts),
      "PYTHON": "python9",
    },
    capture_output=True,
    text=True,
    check=False,
  )


def test_slurm_script_names_what_exists(batch_script, train_flags):
  bash_reads(batch_script)
  usage = re.search(
    r"sbatch .*?launch/slurm\.sbatch(.*?)\n#\n", batch_script, re.S
  )
  words = usage[1].replace("\\\n#", " ").split()
  check_flags(words, train_flags)
  nodes = int(re.search(r"--nodes=(\d+) launch/", batch_script)[1])
  gpus = int(re.search(r"--gpus-per-node=(\d+)", batch_script)[1])
  check_fits(flags_of(words), nodes * gpus)
  command = re.search(r"-m (gdn2_jax\.\w+) (.*?)\"\$@\"", batch_script)
  assert command[1] == "gdn2_jax.train"
  check_flags(command[2].split(), train_flags)
  directives = re.findall(r"^#SBATCH (\S+)", batch_script, re.M)
  assert "--requeue" in directives
  assert "--signal=TERM@120" in directives
  # SLURM reads no directive after the first command.
  assert "#SBATCH" not in batch_script.split("\nset -euo")[1]


def test_slurm_script_starts_python_without_a_shell(tmp_path):
  done = run_batch(tmp_path, 0)
  assert done.returncode == 0, done.stderr
  (line,) = done.stdout.splitlines()
  assert line.startswith("srun ")
  assert line.endswith(
    "python9 -m gdn2_jax.train --distributed --config=a.py --workdir=/r/a b"
  )


@pytest.mark.parametrize(
  ("code", "restarts", "requeued"),
  [(75, 0, True), (137, 9, True), (134, 10, False), (1, 0, False)],
)
def test_slurm_script_requeues_what_may_work(
  tmp_path, code, restarts, requeued
):
  done = run_batch(tmp_path, code, restarts)
  assert done.returncode == code
  assert ("scontrol requeue 7" in done.stdout) == requeued


def test_jobset_adds_up(train_flags):
  jobset = yaml.safe_load((FOLDER / "jobset.yaml").read_text())
  assert jobset["kind"] == "JobSet"
  (replicated,) = jobset["spec"]["replicatedJobs"]
  job = replicated["template"]["spec"]
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  assert container["command"] == ["python", "-m", "gdn2_jax.train"]
  check_flags(container["args"], train_flags)
  given = flags_of(container["args"])
  # The stable name of pod 0 of job 0, and the port that is open there.
  name = jobset["metadata"]["name"]
  host = f"{name}-{replicated['name']}-0-0.{name}"
  port = container["ports"][0]["containerPort"]
  assert given["coordinator_address"] == f"{host}:{port}"
  count = int(given["num_processes"])
  assert job["parallelism"] == job["completions"] == count
  check_fits(given, count * container["resources"]["limits"]["nvidia.com/gpu"])
  # Kubernetes puts variables of the container into its arguments.
  (index,) = container["env"]
  assert given["process_id"] == f"$({index['name']})"
  path = index["valueFrom"]["fieldRef"]["fieldPath"]
  assert path == (
    "metadata.annotations['batch.kubernetes.io/job-completion-index']"
  )
  assert job["completionMode"] == "Indexed"
  # All pods start again together, and only for a reason that may pass.
  assert pod["restartPolicy"] == "Never"
  assert job["backoffLimit"] == 0
  assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
  (rule,) = job["podFailurePolicy"]["rules"]
  assert rule["onExitCodes"]["containerName"] == container["name"]
  assert rule["onExitCodes"]["values"] == [1, 2]
  mounted = {mount["name"] for mount in container["volumeMounts"]}
  assert mounted == {volume["name"] for volume in pod["volumes"]}
  assert given["workdir"].startswith(container["volumeMounts"][0]["mountPath"])


def test_skypilot_gives_every_node_its_place(tmp_path, train_flags):
  task = yaml.safe_load((FOLDER / "skypilot.yaml").read_text())
  bash_reads(task["setup"])
  bash_reads(task["run"])
  stub = tmp_path / ".venv" / "bin" / "python"
  stub.parent.mkdir(parents=True)
  stub.write_text('#!/bin/sh\nfor word; do echo "$word"; done\n')
  stub.chmod(0o755)
  nodes = task["num_nodes"]
  out = subprocess.run(
    ["bash", "-c", task["run"]],
    cwd=tmp_path,
    env=os.environ
    | task["envs"]
    | {
      "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.9",
      "SKYPILOT_NUM_NODES": str(nodes),
      "SKYPILOT_NODE_RANK": "1",
    },
    capture_output=True,
    text=True,
    check=True,
  ).stdout.splitlines()
  assert out[:2] == ["-m", "gdn2_jax.train"]
  check_flags(out[2:], train_flags)
  given = flags_of(out[2:])
  kind, gpus = task["resources"]["accelerators"].split(":")
  assert kind == "H100"
  check_fits(given, nodes * int(gpus))
  assert given["coordinator_address"] == "10.0.0.4:8476"
  assert (given["num_processes"], given["process_id"]) == (str(nodes), "1")
  assert given["config"] == task["envs"]["CONFIG"]
  assert (ROOT / given["config"]).is_file()
  (volume,) = task["volumes"]
  assert given["workdir"].startswith(volume)
  # The extra that is installed exists.
  extra = re.search(r"\[(\w+)\]", shlex.split(task["setup"])[-1])[1]
  assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()
