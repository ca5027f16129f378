"""Process index and count: from flags, or as JAX detects them.

JAX reads them from the environment of SLURM steps and Open MPI jobs. Its
detection on Kubernetes queries the API of the cluster; use flags there.
"""

import dataclasses
import os
import re

from jax._src.clusters import ClusterEnv, OmpiCluster, SlurmCluster

_CLUSTERS = {"SLURM": SlurmCluster, "Open MPI": OmpiCluster}
_FLAGS = ("--coordinator_address", "--num_processes", "--process_id")


@dataclasses.dataclass(frozen=True)
class Place:
  """Coordinator, process count, process index, and devices to use."""

  coordinator: str  # "host:port" of process 0
  num_processes: int
  process_id: int
  local_devices: tuple[int, ...] | None = None  # numbers on the host, or all
  found_by: str = "flags"

  @property
  def host(self) -> str:
    """Host part of the coordinator's address, without brackets."""
    return self.coordinator.rpartition(":")[0].strip("[]")

  @property
  def port(self) -> int:
    """Port of the coordinator."""
    return int(self.coordinator.rpartition(":")[2])


def find_place(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> Place:
  """The place of this process: given values, else those JAX detects."""
  given = (coordinator_address, num_processes, process_id)
  detected = [name for name, c in _CLUSTERS.items() if c.is_env_present()]
  if None not in given:
    place = Place(*given)
  elif detected:
    place = _detect(detected[0], given)
  else:
    advice = "give " + ", ".join(_FLAGS)
    if "SLURM_JOB_ID" in os.environ:
      advice = "start the processes with srun"
    raise ValueError(
      f"{_FLAGS[given.index(None)]} is missing: no step of SLURM and no job of "
      f"Open MPI was detected; {advice}"
    )
  _check(place)
  return place


def _detect(name: str, given: tuple) -> Place:
  """Given values, and for the others those of the environment."""
  cluster = _CLUSTERS[name]
  port = os.environ.get("JAX_COORDINATOR_PORT")
  detect = (
    lambda: cluster.get_coordinator_address(None, port),
    cluster.get_process_count,
    cluster.get_process_id,
  )
  try:
    found = [
      read() if value is None else value
      for read, value in zip(detect, given, strict=True)
    ]
  except (RuntimeError, LookupError) as e:  # version 5 without mpi4py
    raise ValueError(f"{name}: {e} Or give {', '.join(_FLAGS)}") from e
  return Place(*found, _local_devices(cluster), name)


def _local_devices(cluster: type[ClusterEnv]) -> tuple[int, ...] | None:
  """This process's device where several see all devices of a host."""
  # By default JAX gives a process only the device of its local index, even if
  # it is the only process on a host with eight.
  # SLURM writes "2(x3),1": tasks on each node of the step.
  tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1")
  if cluster is OmpiCluster:
    tasks = os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1")
  alone = re.match(r"\d*", tasks)[0] == "1"
  bound = len(os.environ.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1
  return None if alone or bound else (cluster.get_local_process_id(),)


def _check(place: Place) -> None:
  host, colon, port = place.coordinator.rpartition(":")
  if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
    raise ValueError(
      f"--coordinator_address={place.coordinator!r}: expected host:port"
    )
  if place.num_processes < 1:
    raise ValueError(
      f"--num_processes={place.num_processes}: expected 1 or more"
    )
  if not 0 <= place.process_id < place.num_processes:
    raise ValueError(
      f"--process_id={place.process_id}: expected 0 to "
      f"{place.num_processes - 1}, as there are {place.num_processes} processes"
    )
