"""Route /v1/completions."""

import asyncio
import contextlib
from collections.abc import Coroutine

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from gdn2_jax.serve.http.errors import ApiError
from gdn2_jax.serve.http.fields import Fields, read_fields
from gdn2_jax.serve.http.guard import LEFT, RECORD
from gdn2_jax.serve.http.reply import Reply
from gdn2_jax.serve.http.run import Run
from gdn2_jax.serve.http.service import Service

_LAST_WORDS = 2.0  # seconds to send an error to a client that does not read


class Completions:
  """ASGI app of the route."""

  def __init__(self, service: Service):
    self._service = service
    self._limits = service.limits

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers one request."""
    reply, record = Reply(scope, receive, send), scope[RECORD]
    try:
      try:
        async with asyncio.timeout(self._limits.request_timeout):
          if not self._service.worker.ready:
            raise ApiError(503, "the model is not ready", code="not_ready")
          fields = await self._read(scope, receive)
          prompts = await asyncio.to_thread(self._encode, fields)
          record.prompt_tokens = sum(map(len, prompts))
          self._service.metrics.prompt(record.prompt_tokens)
          run = Run(self._service, fields, prompts)
          try:
            with run.begin():
              await self._unless_gone(receive, run.respond(reply))
          finally:
            record.tokens = run.tokens
      except TimeoutError:
        seconds = self._limits.request_timeout
        raise ApiError(
          408,
          f"the answer was not complete after --request_timeout={seconds:g} "
          "seconds",
          code="timeout",
        ) from None
    except ClientDisconnect:
      record.status = LEFT
    except ApiError as error:
      record.status = error.status  # also of a stream that has begun
      with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LAST_WORDS):
          await reply.fail(error)

  async def _read(self, scope, receive) -> Fields:
    most, body = self._limits.max_body_bytes, bytearray()
    async for part in Request(scope, receive).stream():
      body += part
      if len(body) > most:
        raise ApiError(
          413, f"body: expected at most --max_body_bytes={most} bytes, got more"
        )
    service = self._service
    return read_fields(
      bytes(body),
      service.model_name,
      service.tokenizer.vocab_size,
      self._limits,
    )

  def _encode(self, fields: Fields) -> list[list[int]]:
    prompts, most = [], self._limits.max_prompt_tokens
    for prompt in fields.prompts:
      try:
        ids = (
          self._service.tokenizer.encode(prompt)
          if isinstance(prompt, str)
          else prompt
        )
      except ValueError as error:
        raise ApiError(400, f"prompt: {error}", "prompt") from None
      if len(ids) > most:
        raise ApiError(
          400,
          f"prompt: {len(ids)} tokens, expected at most "
          f"--max_prompt_tokens={most}",
          "prompt",
          "context_length_exceeded",
        )
      prompts.append(ids)
    return prompts

  async def _unless_gone(self, receive: Receive, work: Coroutine) -> None:
    """Runs `work` until it is done, the client leaves or the server is cut."""
    guard = self._service.guard
    assert guard is not None
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    cut = asyncio.ensure_future(guard.cut.wait())
    tasks = (task, gone, cut)
    try:
      await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
      if task.done():
        task.result()
      elif cut.done():
        raise ApiError(
          503,
          "the server stopped, --stop_timeout="
          f"{self._limits.stop_timeout:g} seconds after the signal",
          code="stopping",
        )
      else:
        raise ClientDisconnect
    finally:
      for each in tasks:
        each.cancel()
      await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
  while (await receive())["type"] != "http.disconnect":
    pass
