"""Routes of the server."""

from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gdn2_jax.serve.http.completions import Completions
from gdn2_jax.serve.http.errors import ApiError, show
from gdn2_jax.serve.http.guard import COMPLETIONS, Guard
from gdn2_jax.serve.http.service import Service
from gdn2_jax.serve.metrics import CONTENT_TYPE


def make_app(service: Service, **guarded: Any) -> Guard:
  """The server as an ASGI app.

  Args:
    service: model, worker, limits.
    **guarded: `token`, `hosts` and `log` of `Guard`.
  """
  routes = Routes(service)
  app = Starlette(
    routes=[
      Route(COMPLETIONS, Completions(service), methods=["POST"]),
      Route("/v1/models", routes.models),
      Route("/v1/models/{name:path}", routes.model),
      Route("/v1/sessions/{name}", routes.drop_session, methods=["DELETE"]),
      Route("/health", routes.health),
      Route("/metrics", routes.metrics),
    ],
    exception_handlers={
      HTTPException: _http_error,
      ApiError: _api_error,
      Exception: _bug,
    },
  )
  metrics, worker = service.metrics, service.worker
  metrics.show(
    "gdn2_running_requests",
    "Answers that have a row, those whose prompt is being read included.",
    lambda: worker.running,
  )
  metrics.show(
    "gdn2_waiting_requests",
    "Answers that wait for a row.",
    lambda: max(0, service.answers - worker.running),
  )
  metrics.show("gdn2_sessions", "Sessions kept.", lambda: len(service.sessions))
  service.guard = Guard(app, metrics, **guarded)
  return service.guard


class Routes:
  """Small routes."""

  def __init__(self, service: Service):
    self._service = service

  async def health(self, request: Request) -> Response:
    """200 once requests are answered, 503 before and while stopping."""
    guard = self._service.guard
    stopping = guard is not None and guard.stopping
    ready = self._service.worker.ready and not stopping
    status = "ready" if ready else "stopping" if stopping else "starting"
    return JSONResponse({"status": status}, 200 if ready else 503)

  async def metrics(self, request: Request) -> Response:
    """Counters in the text format of Prometheus."""
    text = self._service.metrics.render()
    return Response(text, headers={"content-type": CONTENT_TYPE})

  async def models(self, request: Request) -> Response:
    """The model that is served, as a list."""
    return JSONResponse({"object": "list", "data": [self._model()]})

  async def model(self, request: Request) -> Response:
    """The model by its name."""
    name = request.path_params["name"]
    if name != self._service.model_name:
      raise ApiError(
        404,
        f"model={show(name)}: no such model, expected "
        f"{show(self._service.model_name)}",
        "model",
        "model_not_found",
      )
    return JSONResponse(self._model())

  def _model(self):
    return {
      "id": self._service.model_name,
      "object": "model",
      "created": self._service.started,
      "owned_by": "gdn2_jax",
    }

  async def drop_session(self, request: Request) -> Response:
    """Forgets a session."""
    name = request.path_params["name"]
    try:
      self._service.sessions.drop(name)
    except KeyError:
      raise ApiError(
        404,
        f"session={show(name)}: no such session",
        "session",
        "session_not_found",
      ) from None
    return JSONResponse({"id": name, "deleted": True})


async def _http_error(request: Request, error: Exception) -> Response:
  """404 and 405 of the router."""
  assert isinstance(error, HTTPException)
  path = f"{request.method} {show(request.url.path)}"
  return ApiError(error.status_code, f"{path}: {error.detail}").response()


async def _api_error(request: Request, error: Exception) -> Response:
  assert isinstance(error, ApiError)
  return error.response()


async def _bug(request: Request, error: Exception) -> Response:
  return ApiError(500, f"internal error: {type(error).__name__}").response()
