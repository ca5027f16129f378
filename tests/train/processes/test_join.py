"""Place of a process, meeting the others, and messages when that fails."""

import os
import re
import socket
import subprocess
import sys
import time

import jax
import pytest

from gdn2_jax.sharding import MeshConfig, batch_sharding, make_mesh
from gdn2_jax.train.device_put import Part, part_to_read, put_batch
from gdn2_jax.train.processes.join import RETRY, is_lost_peer, join
from gdn2_jax.train.processes.place import Place, find_place
from tests.tiny_run import ROOT

SLURM = {
  "SLURM_JOB_ID": "70001",
  "SLURM_STEP_NODELIST": "gpu-a[3,7-9],gpu-b1",
  "SLURM_NTASKS": "5",
  "SLURM_STEP_TASKS_PER_NODE": "1(x5)",
  "SLURM_PROCID": "2",
  "SLURM_LOCALID": "0",
}
OPEN_MPI = {
  "OMPI_COMM_WORLD_SIZE": "4",
  "OMPI_COMM_WORLD_RANK": "3",
  "OMPI_COMM_WORLD_LOCAL_RANK": "1",
  "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
  "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}


@pytest.fixture
def environ(monkeypatch):
  """Sets variables of a cluster where no others are set."""
  for name in [*os.environ]:
    if name.startswith(("SLURM", "OMPI", "JAX_COORD", "CUDA_VIS", "KUBER")):
      monkeypatch.delenv(name)

  def set_all(variables):
    for name, value in variables.items():
      monkeypatch.setenv(name, value)

  return set_all


@pytest.mark.parametrize(
  ("variables", "place"),
  [
    (SLURM, Place(f"gpu-a3:{61440 + 70001 % 4096}", 5, 2, None, "SLURM")),
    (
      SLURM | {"JAX_COORDINATOR_PORT": "1234"},
      Place("gpu-a3:1234", 5, 2, None, "SLURM"),
    ),
    # Several tasks of a node share its devices,
    (
      SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8(x2),4", "SLURM_LOCALID": "3"},
      Place(f"gpu-a3:{61440 + 70001 % 4096}", 5, 2, (3,), "SLURM"),
    ),
    # unless each is bound to one, which it sees as number 0.
    (
      SLURM
      | {"SLURM_STEP_TASKS_PER_NODE": "8(x2),4", "CUDA_VISIBLE_DEVICES": "5"},
      Place(f"gpu-a3:{61440 + 70001 % 4096}", 5, 2, None, "SLURM"),
    ),
    (
      OPEN_MPI,
      Place(
        f"10.96.0.1:{61440 + 1531576320 // 4096 % 4096}", 4, 3, (1,), "Open MPI"
      ),
    ),
  ],
)
def test_clusters_tell_the_place(environ, variables, place):
  environ(variables)
  assert find_place() == place


def test_flags_win(environ):
  environ(SLURM)
  assert find_place("h:1", 3, 0) == Place("h:1", 3, 0)
  assert find_place(num_processes=4).num_processes == 4


@pytest.mark.parametrize(
  ("given", "variables", "message"),
  [
    ((None, None, None), {}, "--coordinator_address is missing: no step of SL"),
    (("h:1", None, 0), {}, "--num_processes is missing.*; give --coord"),
    (("h:1", 2, None), {}, "--process_id is missing"),
    # JAX would ask the API of the cluster.
    (("h:1", 2, None), {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "is missing"),
    # A shell inside an allocation, or a batch script without srun.
    (
      (None, None, None),
      {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"},
      "start the processes with srun",
    ),
    (
      (None, None, None),
      {k: v for k, v in OPEN_MPI.items() if "orte" not in k},
      "mpi4py.* Or give --coordinator_address, --num_proc",
    ),
    (("h", 2, 0), {}, "--coordinator_address='h': expected host:port"),
    (("h:port", 2, 0), {}, "expected host:port"),
    (("h:70000", 2, 0), {}, "expected host:port"),
    (("h:1", 0, 0), {}, "--num_processes=0: expected 1 or more"),
    (("h:1", 2, 2), {}, "--process_id=2: expected 0 to 1"),
    (("h:1", 2, -1), {}, "--process_id=-1: expected 0 to 1"),
  ],
)
def test_wrong_or_missing_places_are_refused(
  environ, given, variables, message
):
  environ(variables)
  with pytest.raises(ValueError, match=message):
    find_place(*given)


def test_errors_of_lost_peers_are_told_from_others():
  error = jax.errors.JaxRuntimeError
  for text in (
    "UNKNOWN: Gloo AllGather failed: [..] Connection closed by peer",
    "INTERNAL: NCCL operation ncclGroupEnd() failed",
    "DEADLINE_EXCEEDED: Barrier timed out",
  ):
    assert is_lost_peer(error(text)) and is_lost_peer(ValueError(text))
  assert is_lost_peer(TimeoutError("Timed out while waiting for the barrier."))
  assert not is_lost_peer(TimeoutError("Timed out while reading a file."))
  assert not is_lost_peer(error("RESOURCE_EXHAUSTED: allocating for nccl"))
  assert not is_lost_peer(ValueError("gloo"))
  wrapped = ValueError("the save failed")
  wrapped.__cause__ = error("UNAVAILABLE: Socket closed")
  assert is_lost_peer(wrapped)


class LocalSharding(jax.sharding.Sharding):
  """The rows and tokens of the devices of one process among several."""

  def __init__(self, mesh, devices):
    self._sharding, self._devices = batch_sharding(mesh), devices

  def addressable_devices_indices_map(self, shape):
    indices = self._sharding.devices_indices_map(shape)
    return {device: indices[device] for device in self._devices}


@pytest.mark.parametrize(
  ("mesh", "processes", "parts"),
  [
    (MeshConfig(data=8), 2, [(0, 2), (1, 2)]),
    (MeshConfig(fsdp=4, tensor=2), 4, [(0, 4), (1, 4), (2, 4), (3, 4)]),
    # Two processes that hold one half of the heads each need the same rows.
    (MeshConfig(fsdp=2, tensor=4), 4, [(0, 2), (0, 2), (1, 2), (1, 2)]),
    (MeshConfig(tensor=8), 2, [(0, 1), (0, 1)]),
    (MeshConfig(data=2, context=4), 4, [(0, 2), (0, 2), (1, 2), (1, 2)]),
  ],
)
def test_processes_read_what_their_devices_need(mesh, processes, parts):
  mesh = make_mesh(mesh)
  size = 8 // processes
  for process, (index, count) in enumerate(parts):
    mine = list(mesh.devices.flat)[process * size : (process + 1) * size]
    found = part_to_read(LocalSharding(mesh, mine), 16, 32)
    assert found == Part(index=index, count=count)


def test_scattered_rows_are_read_whole():
  mesh = make_mesh(MeshConfig(data=8))
  devices = [mesh.devices.flat[i] for i in (0, 4)]
  assert part_to_read(LocalSharding(mesh, devices), 16, 32) == Part()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_any_number_of_hosts_feeds_the_same_batches(dataset, count):
  """The rows of all parts are the global batch, step by step."""
  whole = dataset.train_batches(start_step=3)
  parts = [
    dataset.train_batches(start_step=3, process_index=i, process_count=count)
    for i in range(count)
  ]
  sharding = batch_sharding(make_mesh(MeshConfig(data=4, context=2)))
  for _ in range(3):
    want = put_batch(next(whole), sharding)
    rows = [next(part) for part in parts]
    for name, array in want.items():
      assert array.sharding == sharding
      have = [row[name] for row in rows]
      assert [len(h) for h in have] == [8 // count] * count
      assert (jax.device_get(array) == jax.numpy.concatenate(have)).all()


_JOIN = """
import sys
from gdn2_jax import cli
from gdn2_jax.train.processes import join, place as place_lib
import jax
jax.config.update("jax_platforms", "cpu")
address, count, index = (value or None for value in sys.argv[1:4])
number = lambda text: None if text is None else int(text)
with join.leaving_at_once(), cli.one_line_errors():
  place = place_lib.find_place(address, number(count), number(index))
  join.join(place, init_timeout=float(sys.argv[4]), heartbeat_timeout=10)
  print("met", jax.process_index(), jax.process_count(), place.found_by)
"""


def start(address="", count="", index="", *, timeout=3.0, **variables):
  """A process that only meets the others."""
  return subprocess.Popen(
    [sys.executable, "-c", _JOIN, address, count, index, str(timeout)],
    cwd=ROOT,
    env={k: v for k, v in os.environ.items() if "SLURM" not in k} | variables,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def outcome(process) -> tuple[int, str]:
  out, _ = process.communicate(timeout=60)
  return process.returncode, out


@pytest.fixture
def port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


@pytest.mark.slow
def test_two_tasks_of_slurm_meet(port):
  step = SLURM | {
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
    "JAX_COORDINATOR_PORT": str(port),
  }
  tasks = [
    start(timeout=60, **(step | {"SLURM_PROCID": str(i)})) for i in range(2)
  ]
  for i, task in enumerate(tasks):
    code, out = outcome(task)
    assert code == 0, out
    assert f"met {i} 2 SLURM" in out


@pytest.mark.slow
def test_absent_peers_are_named_within_the_time_out(port):
  """A peer that never starts, seen from both sides, and a wrong address."""
  address = f"127.0.0.1:{port}"
  begin = time.monotonic()
  cases = {
    "process 0 of 3 waited 6 s .*not all the others called": start(
      address, "3", "0", timeout=6
    ),
    "process 1 of 3 waited 3 s .* answers, but not all": start(
      address, "3", "1", timeout=3
    ),
    "process 1 of 2 waited 3 s .*nothing answers at 127.0.0.1:1:": start(
      "127.0.0.1:1", "2", "1", timeout=3
    ),
  }
  for message, process in cases.items():
    code, out = outcome(process)
    assert re.search(message, out), out
    assert code == RETRY
    assert "Traceback" not in out
  # The time-outs, and three interpreters that start at once.
  assert time.monotonic() - begin < 40


def test_another_number_of_processes_is_refused(port):
  address = f"127.0.0.1:{port}"
  first = start(address, "2", "0", timeout=60)
  code, out = outcome(start(address, "3", "1", timeout=60))
  first.kill()
  first.communicate()
  assert code == 1, out
  assert f"--num_processes=3 here, but 2 at the coordinator {address}" in out


def test_a_port_in_use_is_refused(port):
  """gRPC would share it, and two runs would mix."""
  with socket.create_server(("127.0.0.1", port)):
    with pytest.raises(ValueError, match=f"cannot listen on port {port}"):
      join(Place(f"127.0.0.1:{port}", 2, 0))
