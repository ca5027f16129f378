"""Checks of every request before its route: host, token, type, shutdown."""

import asyncio
import dataclasses
import hmac
import sys
import time
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gdn2_jax.serve.http.errors import ApiError, show
from gdn2_jax.serve.metrics import Metrics

COMPLETIONS = "/v1/completions"
RECORD = "gdn2.record"  # key of the scope
LEFT = 499  # status in log and metrics of a client that left


@dataclasses.dataclass
class Record:
  """What the log tells of a request.

  Attributes:
    status: of the response.
    prompt_tokens, tokens: read and chosen.
  """

  status: int = 0
  prompt_tokens: int = 0
  tokens: int = 0


class Guard:
  """ASGI middleware around all routes.

  Args:
    app: routes.
    metrics: counts requests for completions.
    token: clients must send it as `Authorization: Bearer TOKEN`; None lets all
      in. /health needs none.
    hosts: names in the header Host that are let in, so that no web page can
      reach the server under a name of its own; None allows all.
    log: gets one line per request.

  Attributes:
    stopping: True refuses all but /health.
    active: requests that are being answered.
    cut: set, it ends them.
  """

  def __init__(
    self,
    app: ASGIApp,
    metrics: Metrics,
    *,
    token: str | None = None,
    hosts: frozenset[str] | None = None,
    log: Callable[[str], Any] = lambda line: print(
      line, file=sys.stderr, flush=True
    ),
  ):
    self._app, self._metrics, self._log = app, metrics, log
    self._token = None if token is None else f"Bearer {token}".encode()
    self._hosts = hosts
    self.stopping = False
    self.active = 0
    self.cut = asyncio.Event()

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers one request, logs and counts it."""
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return
    start, record = time.monotonic(), Record()
    scope[RECORD] = record

    async def noting_send(message: Message) -> None:
      if message["type"] == "http.response.start":
        record.status = record.status or message["status"]
      await send(message)

    self.active += 1
    try:
      try:
        self._check(scope)
      except ApiError as error:
        await error.response()(scope, receive, noting_send)
      else:
        await self._app(scope, receive, noting_send)
    finally:
      self.active -= 1
      self._end(scope, record, time.monotonic() - start)

  def _end(self, scope, record, seconds):
    client = (scope.get("client") or ("-",))[0]
    line = f"{scope['method']} {scope['path'][:80]}"
    tokens = ""
    if scope["path"] == COMPLETIONS:
      self._metrics.request(record.status)
      tokens = f" {record.prompt_tokens}+{record.tokens} tokens"
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    self._log(
      f"{now} {client} {line!a} {record.status}{tokens} {seconds:.3f} s"
    )

  def _check(self, scope):
    headers = dict(scope["headers"])
    if self._hosts is not None:
      host = headers.get(b"host", b"").decode("latin-1")
      name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
      if name not in self._hosts:
        raise ApiError(
          403, f"Host={show(host)}: expected one of {sorted(self._hosts)}"
        )
    if scope["path"] == "/health":
      return
    if self._token is not None and not hmac.compare_digest(
      headers.get(b"authorization", b""), self._token
    ):
      raise ApiError(
        401,
        "Authorization: expected 'Bearer TOKEN' with the token of this server",
        code="invalid_api_key",
      )
    if self.stopping:
      raise ApiError(503, "the server is stopping", code="stopping")
    kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    # A web page of another origin cannot send this type without being asked.
    if scope["method"] == "POST" and kind != b"application/json":
      raise ApiError(
        415,
        f"Content-Type={show(kind.decode('latin-1'))}: expected "
        "application/json",
      )
