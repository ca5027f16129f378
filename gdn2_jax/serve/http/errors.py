"""Errors as clients of OpenAI's interface expect them."""

import json
from typing import Any

from starlette.responses import JSONResponse

_TYPES = {
  401: "authentication_error",
  408: "timeout_error",
  429: "rate_limit_error",
  500: "server_error",
  503: "server_error",
}
_AGAIN = {429: "1", 503: "5"}  # Retry-After, seconds
_MOST = 60  # characters of a value that are shown


class ApiError(Exception):
  """Refusal of a request: status, and one line that says why.

  Args:
    status: HTTP status, 400 to 599.
    message: names the argument, its value and what was expected.
    param: field of the request at fault, if one is.
    code: short name for programs, if there is one.
  """

  def __init__(
    self,
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
  ):
    super().__init__(message)
    self.status = status
    self.body: dict[str, Any] = {
      "error": {
        "message": " ".join(message.split()),
        "type": _TYPES.get(status, "invalid_request_error"),
        "param": param,
        "code": code,
      }
    }

  def response(self) -> JSONResponse:
    """The refusal as a response."""
    headers = {}
    if self.status in _AGAIN:
      headers["Retry-After"] = _AGAIN[self.status]
    if self.status == 401:
      headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(self.body, self.status, headers)


def show(value: Any) -> str:
  """A value of a request, short enough for one line."""
  try:
    text = json.dumps(value)  # ASCII
  except (TypeError, ValueError, RecursionError):
    text = ascii(value)
  return text if len(text) <= _MOST else text[:_MOST] + "..."
