"""Answers to one request, from the first token to the last."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from gdn2_jax.inference.checks import NonFiniteError
from gdn2_jax.serve.answer import Answer
from gdn2_jax.serve.conversation import TAIL, Conversation
from gdn2_jax.serve.http.errors import ApiError, show
from gdn2_jax.serve.http.fields import Fields
from gdn2_jax.serve.http.reply import Reply
from gdn2_jax.serve.http.service import Service
from gdn2_jax.serve.worker import Ended, Job


class Choice:
  """One answer of a request, while its tokens come.

  Attributes:
    answer: text and tokens so far.
    finish: None, "stop" or "length".
    conversation: of a session, once finished.
  """

  def __init__(self, job: Job, answer: Answer, service: Service):
    self.job, self.answer = job, answer
    self.finish: str | None = None
    self.conversation: Conversation | None = None
    self._service = service

  def take(self, event: Any) -> str:
    """Text that is final after an event of the worker; may be empty.

    Raises:
      ApiError: the answer failed.
    """
    if self.finish:
      return ""
    if not isinstance(event, Ended):
      text = self.answer.push(event)
      if self.answer.stopped:
        self._stop()
      return text
    if event.error is not None:
      raise _failure(event.error)
    text = self.answer.end()
    if self.answer.stopped:
      self._stop()
    else:
      self.finish = "stop" if event.complete else "length"
      self.conversation = event.conversation
    return text

  def _stop(self):
    """Ends at a stop string; the text before it is read with the next turn."""
    self.finish = "stop"
    self.job.cancel()
    if self.job.keep:
      before, prompt = self.job.conversation, self.job.prompt
      kept = self._service.tokenizer.encode(self.answer.text)
      self.conversation = before.followed_by(
        [*prompt, *kept],
        pending=(*before.pending, *prompt, *kept),
        draws=before.draws + len(self.answer.tokens),
        seed=self.job.seed,
      )


class Run:
  """Answers to one checked request."""

  def __init__(
    self, service: Service, fields: Fields, prompts: list[list[int]]
  ):
    self._service, self._fields, self._prompts = service, fields, prompts
    self._name = f"cmpl-{secrets.token_hex(12)}"
    self._created = int(time.time())
    self._session: str | None = None
    self._choices: list[Choice] = []
    self._events: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()

  @property
  def tokens(self) -> int:
    """Tokens of all answers so far."""
    return sum(len(choice.answer.tokens) for choice in self._choices)

  @contextlib.contextmanager
  def begin(self) -> Iterator[None]:
    """Hands all answers to the worker; on exit frees what still runs.

    Raises:
      ApiError: too many requests, no text, or a session that cannot be used.
    """
    service, count = self._service, len(self._prompts) * self._fields.n
    most = service.limits.max_concurrent
    if service.answers + count > most:
      raise ApiError(
        429,
        f"{service.answers} answers run or wait and {count} are asked for, "
        f"expected at most --max_concurrent={most} together",
        code="too_many_requests",
      )
    conversation = self._open()
    try:
      for prompt in self._prompts:
        if not prompt and not conversation.pending:
          raise ApiError(
            400, "prompt: no tokens, expected at least one", "prompt"
          )
      self._check_room(conversation)
      self._submit(conversation)
      yield
    finally:
      for choice in self._choices:
        if not choice.finish:
          choice.job.cancel()
      if self._session is not None:
        service.sessions.release(self._session)

  def _open(self) -> Conversation:
    wanted, sessions = self._fields.session, self._service.sessions
    if wanted is None:
      return Conversation()
    if not self._service.limits.max_sessions:
      raise ApiError(
        400, "session: expected none, --max_sessions=0 keeps none", "session"
      )
    try:
      self._session, conversation = sessions.begin(wanted)
    except KeyError:
      raise ApiError(
        404,
        f"session={show(wanted)}: no such session, or it was dropped as the "
        f"least recently used of {self._service.limits.max_sessions}; expected "
        'an id that a response gave, or "new" with the whole text',
        "session",
        "session_not_found",
      ) from None
    except BlockingIOError:
      raise ApiError(
        409,
        f"session={show(wanted)}: another request of it is not done, expected "
        "one at a time",
        "session",
        "session_busy",
      ) from None
    return conversation

  def _check_room(self, conversation):
    """Full attention has slots for so many tokens of a session."""
    state, most = conversation.state, self._service.limits.max_length
    if state is None or state.max_length is None:
      return
    total = (
      conversation.tokens + len(self._prompts[0]) + self._fields.max_tokens
    )
    if total > most:
      raise ApiError(
        400,
        f"session: {total} tokens with the prompt and max_tokens, expected at "
        f"most {most} for a model with full attention",
        "session",
        "context_length_exceeded",
      )

  def _submit(self, conversation):
    fields, service = self._fields, self._service
    loop = asyncio.get_running_loop()
    seed = fields.seed
    if seed is None:
      seed = conversation.seed
    if seed is None:
      seed = secrets.randbits(32)

    def emit_as(index):
      def arrive(event):
        if isinstance(event, Ended):
          service.answers -= 1
        self._events.put_nowait((index, event))

      def emit(event):
        with contextlib.suppress(RuntimeError):  # the loop has ended
          loop.call_soon_threadsafe(arrive, event)

      return emit

    for prompt in self._prompts:
      context = [*conversation.tail, *prompt][-TAIL:]
      for number in range(fields.n):
        job = Job(
          prompt=prompt,
          max_tokens=fields.max_tokens,
          sampler=fields.sampler,
          seed=seed,
          choice=number,
          conversation=conversation,
          keep=self._session is not None,
          emit=emit_as(len(self._choices)),
        )
        decode = service.tokenizer.decode
        answer = Answer(decode, context, fields.stops)
        self._choices.append(Choice(job, answer, service))
        service.answers += 1
        service.worker.submit(job)

  async def respond(self, reply: Reply) -> None:
    """Sends the answers as they come, or all of them at the end."""
    fields = self._fields
    async for index, choice, text in self._texts():
      if fields.stream and (text or choice.finish):
        await reply.event(self._body([_shown(index, text, choice.finish)]))
    self._keep()
    usage = self._usage()
    if fields.stream:
      if fields.include_usage:
        await reply.event(self._body([]) | {"usage": usage})
      await reply.end()
      return
    shown = [
      _shown(index, choice.answer.text, choice.finish)
      for index, choice in enumerate(self._choices)
    ]
    await reply.json(self._body(shown) | {"usage": usage})

  async def _texts(self) -> AsyncIterator[tuple[int, Choice, str]]:
    open_choices = len(self._choices)
    while open_choices:
      index, event = await self._events.get()
      choice = self._choices[index]
      if choice.finish:
        continue
      text = choice.take(event)
      open_choices -= choice.finish is not None
      yield index, choice, text

  def _keep(self):
    if self._session is not None:
      conversation = self._choices[0].conversation
      assert conversation is not None
      self._service.sessions.keep(self._session, conversation)

  def _body(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
    body: dict[str, Any] = {
      "id": self._name,
      "object": "text_completion",
      "created": self._created,
      "model": self._service.model_name,
      "choices": choices,
    }
    if self._session is not None:
      body["session"] = self._session
    return body

  def _usage(self) -> dict[str, int]:
    prompt = sum(map(len, self._prompts))
    return {
      "prompt_tokens": prompt,
      "completion_tokens": self.tokens,
      "total_tokens": prompt + self.tokens,
    }


def _shown(index: int, text: str, finish: str | None) -> dict[str, Any]:
  return {
    "index": index,
    "text": text,
    "logprobs": None,
    "finish_reason": finish,
  }


def _failure(error: BaseException) -> ApiError:
  if isinstance(error, NonFiniteError):
    return ApiError(500, str(error), code="non_finite_logits")
  if isinstance(error, ValueError):
    return ApiError(400, str(error))
  return ApiError(500, f"the answer failed: {type(error).__name__}")
