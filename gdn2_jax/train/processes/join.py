"""Joining the processes of a run, and leaving when one of them is lost.

Nothing here happens unless it is asked for: any shell on a cluster carries some
of the variables by which JAX detects SLURM and Open MPI.
"""

import contextlib
import math
import os
import re
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import NoReturn

import jax

from gdn2_jax.train.processes import RETRY
from gdn2_jax.train.processes.place import Place

# What the messages of gloo, NCCL and the coordination service have in common.
_SIGNS_OF_A_LOST_PEER = re.compile(
  r"gloo|nccl|connection (closed|reset|refused)|broken pipe|socket closed"
  r"|heartbeat|coordination ?service|another task|barrier"
  r"|UNAVAILABLE|DEADLINE_EXCEEDED",
  re.IGNORECASE,
)
# JAX passes some errors of the runtime on as a ValueError.
_STATUS_OF_THE_RUNTIME = re.compile(
  r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): "
)


def join(
  place: Place, *, init_timeout: float = 300, heartbeat_timeout: float = 100
) -> None:
  """Joins the other processes; call it before any device is used."""
  if place.num_processes == 1:
    return
  loopback = place.host in ("127.0.0.1", "localhost", "::1")
  if place.process_id == 0:
    _check_port_is_free(place)
  # At its own time-out JAX aborts the process with a C++ stack trace. This one
  # is earlier: one line, and an exit code that means "start again".
  alarm = threading.Timer(init_timeout, _give_up, (place, init_timeout))
  alarm.daemon = True
  alarm.start()
  try:
    jax.distributed.initialize(
      place.coordinator,
      place.num_processes,
      place.process_id,
      local_device_ids=place.local_devices,
      cluster_detection_method="deactivate",
      initialization_timeout=math.ceil(init_timeout) + 60,
      heartbeat_timeout_seconds=math.ceil(heartbeat_timeout),
      coordinator_bind_address=place.coordinator if loopback else None,
    )
    # JAX takes the number of process 0 without comparing.
    if jax.process_count() != place.num_processes:
      raise ValueError(
        f"--num_processes={place.num_processes} here, but "
        f"{jax.process_count()} at the coordinator {place.coordinator}: give "
        "all processes the same"
      )
  finally:
    alarm.cancel()


def _check_port_is_free(place: Place) -> None:
  """Refuses a port in use: gRPC would share it with another run."""
  family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
  with socket.socket(family) as probe:
    # Closed connections of an earlier run (TIME_WAIT) do not count.
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      probe.bind(("", place.port))
    except OSError as e:
      raise ValueError(
        f"--coordinator_address={place.coordinator}: cannot listen on port "
        f"{place.port} ({e.strerror}); is another run using it?"
      ) from e


def _give_up(place: Place, waited: float) -> NoReturn:
  me = f"process {place.process_id} of {place.num_processes}"
  same = (
    "all must be started, each with its own --process_id and with the same "
    "--num_processes and --coordinator_address"
  )
  if place.process_id == 0:
    why = f"not all the others called at {place.coordinator}: {same}"
  elif _answers(place):
    why = f"{place.coordinator} answers, but not all processes came: {same}"
  else:
    why = (
      f"nothing answers at {place.coordinator}: process 0 did not start, or it "
      "listens elsewhere (--coordinator_address), or a firewall is between"
    )
  leave(f"{me} waited {waited:g} s (--init_timeout): {why}", RETRY)


def _answers(place: Place) -> bool:
  try:
    socket.create_connection((place.host, place.port), timeout=1).close()
  except OSError:
    return False
  return True


def leave(message: str, code: int) -> NoReturn:
  """Prints one line and ends this process at once, without clean-up."""
  # A regular exit waits for peers that may be gone, and is then aborted.
  with contextlib.suppress(OSError, ValueError):
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
  os._exit(code)


def is_lost_peer(error: BaseException) -> bool:
  """True if the loss of another process may have caused an error."""
  chain: list[BaseException] = []
  while error is not None and error not in chain:
    chain.append(error)
    # For example a save that failed because a peer was gone.
    error = error.__cause__ or error.__context__
  return any(map(_tells_of_a_lost_peer, chain))


def _tells_of_a_lost_peer(error: BaseException) -> bool:
  text = str(error)
  if isinstance(error, TimeoutError):
    return "barrier" in text
  is_of_the_runtime = isinstance(error, jax.errors.JaxRuntimeError) or (
    isinstance(error, ValueError) and _STATUS_OF_THE_RUNTIME.match(text)
  )
  if not is_of_the_runtime:
    return "Barrier" in type(error).__name__
  if "RESOURCE_EXHAUSTED" in text:
    return False  # out of memory, which may name the collective that was next
  return bool(_SIGNS_OF_A_LOST_PEER.search(text))


@contextlib.contextmanager
def leaving_if_a_peer_is_lost() -> Iterator[None]:
  """Ends this process with `RETRY` if another process of the run is lost.

  Enter it after everything that cleans up: closing a checkpoint waits for the
  peers.
  """
  try:
    yield
  except Exception as e:
    if jax.process_count() > 1 and is_lost_peer(e):
      where = f"process {jax.process_index()}"
      leave(f"{where}: lost another process: {str(e)[:400]}", RETRY)
    raise


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
  """Ends a failing process of several without waiting for the others.

  A regular exit would wait in a barrier while they wait for this process in a
  collective, and would be aborted with an exit code that hides the reason.
  """
  try:
    yield
  except BaseException as e:
    if not jax.distributed.is_initialized():
      raise
    if isinstance(e, SystemExit):
      # The reason was printed where it was raised.
      code = e.code if isinstance(e.code, int) else int(e.code is not None)
      if code == 0:
        raise
    else:
      traceback.print_exception(e)
      interrupted = isinstance(e, KeyboardInterrupt)
      code = RETRY if is_lost_peer(e) else 130 if interrupted else 1
    leave(f"process {jax.process_index()} leaves with code {code}", code)
