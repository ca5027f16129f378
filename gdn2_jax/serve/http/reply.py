"""Response of a request for completions: JSON, or a stream of events."""

import json
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from gdn2_jax.serve.http.errors import ApiError


class Reply:
  """Sends a response; a failure fits what was sent before.

  Args:
    scope, receive, send: of the request.
  """

  def __init__(self, scope: Scope, receive: Receive, send: Send):
    self._scope, self._receive, self._send = scope, receive, send
    self._streams = self._ended = False

  async def json(self, body: dict[str, Any]) -> None:
    """Sends all at once."""
    self._ended = True
    await JSONResponse(body)(self._scope, self._receive, self._send)

  async def event(self, body: dict[str, Any]) -> None:
    """Sends a server-sent event; the first one begins the stream."""
    await self._data(json.dumps(body))

  async def end(self) -> None:
    """Ends the stream."""
    await self._data("[DONE]", last=True)

  async def fail(self, error: ApiError) -> None:
    """Sends an error: as a response, or as the last event."""
    if self._ended:
      return
    if self._streams:
      await self._data(json.dumps(error.body), last=True)
    else:
      self._ended = True
      await error.response()(self._scope, self._receive, self._send)

  async def _data(self, text: str, last: bool = False) -> None:
    if not self._streams:
      self._streams = True
      headers = [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
      ]
      await self._send(
        {"type": "http.response.start", "status": 200, "headers": headers}
      )
    self._ended = last
    await self._send(
      {
        "type": "http.response.body",
        "body": f"data: {text}\n\n".encode(),
        "more_body": not last,
      }
    )
