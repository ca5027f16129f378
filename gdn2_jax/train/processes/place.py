"""Process index and count from the cluster environment.

Flags say it, or what SLURM, Open MPI or an indexed Kubernetes job put into the
environment of every process that they start.
"""

import dataclasses
import os
import re
import zlib
from collections.abc import Callable, Mapping

# Ports that no service is registered for; one is chosen by the job's number.
_FIRST_PORT, _NUM_PORTS = 61440, 4096


@dataclasses.dataclass(frozen=True)
class Place:
  """One process among all those of a run.

  Attributes:
    coordinator: "host:port" where process 0 listens.
    num_processes: of the run.
    process_id: of this process, from 0.
    local_devices: ids of the host's devices that are this process's; None for
      all of them.
    found_by: where that is known from, for messages.
  """

  coordinator: str
  num_processes: int
  process_id: int
  local_devices: tuple[int, ...] | None = None
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
  environ: Mapping[str, str] | None = None,
) -> Place:
  """The place of this process: what is given, then what the cluster says.

  Args:
    coordinator_address: "host:port" where process 0 listens.
    num_processes: of the run.
    process_id: of this process.
    environ: environment variables; None reads those of this process.

  Raises:
    ValueError: something is given wrongly or known from nowhere; the message
      names the flag.
  """
  environ = os.environ if environ is None else environ
  found_by, found = "flags", {}
  for name, detect in _CLUSTERS.items():
    detected = detect(environ)
    if detected is not None:
      found_by, found = name, detected
      break
  given = {
    "coordinator": coordinator_address,
    "num_processes": num_processes,
    "process_id": process_id,
  }
  if None not in given.values():
    found_by, found = "flags", {}  # nothing is left to the environment
  known = found | {k: v for k, v in given.items() if v is not None}
  for name in given:
    if known.get(name) is None:
      raise ValueError(_explain_unknown(name, found_by, known))
  place = Place(**known, found_by=found_by)
  _check(place)
  return place


def _explain_unknown(name: str, found_by: str, known: Mapping) -> str:
  flag = {"coordinator": "coordinator_address"}.get(name, name)
  if found_by == "flags":
    where = (
      "no SLURM step, Open MPI job or indexed Kubernetes job is to be seen"
    )
  else:
    where = f"{found_by} does not tell it"
  hint = {
    "SLURM": "; start the processes with srun",
    "Open MPI": "; give the host of rank 0",
    "Kubernetes": "; launch/jobset.yaml shows how",
  }.get(found_by, "")
  have = ", ".join(f"{k}={v}" for k, v in known.items() if v is not None)
  return f"--{flag} is missing: {where}{hint}" + (
    f" (known: {have})" if have else ""
  )


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


def _number(environ: Mapping[str, str], *names: str) -> int | None:
  """The first of these variables that holds a number."""
  for name in names:
    if environ.get(name, "").isdecimal():
      return int(environ[name])
  return None


def _port_of(environ: Mapping[str, str], job: int) -> int:
  chosen = _number(environ, "JAX_COORDINATOR_PORT")
  return _FIRST_PORT + job % _NUM_PORTS if chosen is None else chosen


def _devices(environ: Mapping[str, str], local_id, local_count):
  """Device `local_id` where several processes see all devices of a host."""
  alone = local_id is None or local_count in (None, 1)
  bound = len(environ.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1
  return None if alone or bound else (local_id,)


def first_host(node_list: str) -> str:
  """First host of a list as SLURM writes it: "gpu-a[3,7-9],b1" is "gpu-a3"."""
  head = re.match(r"(?:[^,\[]|\[[^\]]*\])*", node_list)
  assert head is not None
  return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", head[0])


def _slurm(environ: Mapping[str, str]) -> dict | None:
  job = _number(environ, "SLURM_JOB_ID", "SLURM_JOBID")
  if job is None:
    return None
  nodes = environ.get("SLURM_STEP_NODELIST")
  if nodes is None:
    return {}  # inside an allocation, but not started by srun
  port = _port_of(environ, job)
  # "2(x3),1": tasks on each node of the step.
  each = re.match(r"\d+", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
  return {
    "coordinator": f"{first_host(nodes)}:{port}",
    "num_processes": _number(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
    "process_id": _number(environ, "SLURM_PROCID"),
    "local_devices": _devices(
      environ,
      _number(environ, "SLURM_LOCALID"),
      int(each[0]) if each else None,
    ),
  }


def _open_mpi(environ: Mapping[str, str]) -> dict | None:
  size = _number(environ, "OMPI_COMM_WORLD_SIZE")
  if size is None:
    return None
  local_size = _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE")
  # Version 4 names the host of mpirun, where rank 0 runs; version 5 does not.
  uri = environ.get("OMPI_MCA_orte_hnp_uri", "")
  address = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", uri)
  host = next(filter(None, address.groups())) if address else None
  if host is None and local_size == size:
    host = "127.0.0.1"
  job = zlib.crc32((uri or environ.get("PMIX_NAMESPACE", "")).encode())
  if host and ":" in host:
    host = f"[{host}]"
  return {
    "coordinator": host and f"{host}:{_port_of(environ, job)}",
    "num_processes": size,
    "process_id": _number(environ, "OMPI_COMM_WORLD_RANK"),
    "local_devices": _devices(
      environ, _number(environ, "OMPI_COMM_WORLD_LOCAL_RANK"), local_size
    ),
  }


def _kubernetes(environ: Mapping[str, str]) -> dict | None:
  index = _number(environ, "JOB_COMPLETION_INDEX")
  return None if index is None else {"process_id": index}


_CLUSTERS: dict[str, Callable] = {
  "SLURM": _slurm,
  "Open MPI": _open_mpi,
  "Kubernetes": _kubernetes,
}
