"""Server process: its socket, its signals, its end."""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from gdn2_jax.serve.http.guard import Guard
from gdn2_jax.serve.limits import Limits
from gdn2_jax.serve.worker import Worker

_POLL = 0.02  # seconds
_CUT = 3.0  # seconds that requests get to say that they were cut


class _Server(uvicorn.Server):
  @contextlib.contextmanager
  def capture_signals(self) -> Iterator[None]:
    yield  # `serve` handles them; uvicorn would end by the signal


def bind(host: str, port: int) -> socket.socket:
  """A socket at this address, which does not listen yet.

  Args:
    host: IPv4 or IPv6 address, or a name.
    port: 0 takes a free one.

  Raises:
    ValueError: the address cannot be used.
  """
  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  listener = socket.socket(family)
  try:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
  except (OSError, OverflowError) as error:
    listener.close()
    reason = getattr(error, "strerror", None) or error
    raise ValueError(
      f"--host={host} --port={port}: expected a free address of this machine: "
      f"{reason}"
    ) from None
  return listener


def url_of(listener: socket.socket) -> str:
  """http://HOST:PORT of a bound socket."""
  host, port = listener.getsockname()[:2]
  return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve(
  app: Guard,
  worker: Worker,
  limits: Limits,
  listener: socket.socket,
  note: Callable[[str], Any],
) -> int:
  """Answers requests until a signal, or an error of the worker.

  SIGTERM or SIGINT refuses new requests and lets the others finish, for
  `limits.stop_timeout` seconds; the second one ends the process at once.

  Args:
    app: from `make_app`.
    worker: not started yet.
    limits: bounds of the server.
    listener: from `bind`.
    note: gets lines for the user.

  Returns:
    Exit status: 0, or 1 after an error of the worker.
  """
  config = uvicorn.Config(
    app,
    loop="asyncio",
    http="h11",
    ws="none",
    lifespan="off",
    log_config=None,
    access_log=False,
    server_header=False,
    timeout_graceful_shutdown=3,
  )
  server, loop = _Server(config), asyncio.get_running_loop()

  def on_signal(number: int) -> None:
    if app.stopping:
      os._exit(128 + number)  # JAX may be computing in other threads
    app.stopping = True
    note(
      f"stopping: {app.active} requests have {limits.stop_timeout:g} s to "
      "finish; a second signal ends them"
    )

  for number in (signal.SIGINT, signal.SIGTERM):
    loop.add_signal_handler(number, on_signal, number)
  worker.start()
  task = asyncio.ensure_future(server.serve(sockets=[listener]))
  ready = False
  while not (app.stopping or worker.error or task.done()):
    if not ready and server.started and worker.ready:
      ready = True
      note(f"ready at {url_of(listener)}")
    await asyncio.sleep(_POLL)
  app.stopping = True
  if worker.error is None:
    await _until_idle(app, limits.stop_timeout)
  if app.active:
    note(f"cut: {app.active} requests")
    app.cut.set()
    await _until_idle(app, _CUT)
  server.should_exit = True
  await task
  return 0 if worker.error is None else 1


async def _until_idle(app: Guard, seconds: float) -> None:
  end = time.monotonic() + seconds
  while app.active and time.monotonic() < end:
    await asyncio.sleep(_POLL)
