"""A tiny server without sockets: one worker, and an app per test."""

import asyncio
import json

import jax
import pytest
from starlette.testclient import TestClient

from gdn2_jax.inference.generate import generate
from gdn2_jax.inference.sampling import Sampler
from gdn2_jax.serve.conversation import Sessions
from gdn2_jax.serve.http.app import make_app
from gdn2_jax.serve.http.service import Service
from gdn2_jax.serve.limits import Limits
from gdn2_jax.serve.metrics import Metrics
from gdn2_jax.serve.worker import Worker
from tests.eval.plain import make_model

SLOTS = 3


@pytest.fixture(scope="session")
def metrics():
  return Metrics()


@pytest.fixture(scope="session")
def worker(metrics):
  """A thread that has compiled; pieces of 16 tokens."""
  lines = []
  worker = Worker(
    make_model(),
    metrics,
    num_slots=SLOTS,
    prefill_piece=16,
    max_length=4096,
    note=lines.append,
  )
  worker.start()
  asyncio.run(until(lambda: worker.ready or worker.error))
  assert worker.error is None
  assert lines[0] == (
    "compiling: reading 16 tokens of a prompt, decoding 3 rows"
  )
  yield worker
  assert worker.stop(60.0)


@pytest.fixture
def make(worker):
  """Makes an app with limits; after the test no row is taken."""

  def make(*, guarded=None, **limits):
    limits = Limits(**limits)
    service = Service(
      model_name="tiny",
      tokenizer=make_model().tokenizer,
      worker=worker,
      limits=limits,
      metrics=Metrics(),
      sessions=Sessions(limits.max_sessions),
    )
    log = []
    app = make_app(service, log=log.append, **(guarded or {}))
    app.lines, app.service = log, service
    return app

  yield make
  asyncio.run(until(lambda: worker.running == 0))


@pytest.fixture
def open_client(make):
  """Opens clients of apps with limits."""
  clients = []

  def open_client(**options):
    app = make(**options)
    client = TestClient(app, base_url="http://127.0.0.1")
    client.__enter__()  # one loop for all its requests
    client.server = app
    clients.append(client)
    return client

  yield open_client
  for client in clients:
    client.__exit__(None, None, None)


@pytest.fixture
def client(open_client):
  return open_client()


async def until(condition, seconds=60):
  async with asyncio.timeout(seconds):
    while not condition():
      await asyncio.sleep(0.005)


def ask(client, **fields):
  """The response to a request for completions."""
  return client.post("/v1/completions", json={"prompt": "de f"} | fields)


def complete(client, **fields):
  """Text of the one answer of a request that succeeds."""
  response = ask(client, **fields)
  assert response.status_code == 200, response.text
  (choice,) = response.json()["choices"]
  return choice["text"]


def error_of(response, status):
  """The one line of a refusal."""
  assert response.status_code == status, response.text
  body = response.json()
  assert set(body) == {"error"}
  assert set(body["error"]) == {"message", "type", "param", "code"}
  assert "\n" not in body["error"]["message"]
  return body["error"]["message"]


def generated(prompt, count, *, temperature=0.0, seed=0, choice=0, **sampler):
  """Ids that `generate` gives for a text."""
  model = make_model()
  rng = jax.random.key(seed)
  if choice:
    rng = jax.random.fold_in(rng, choice)
  (ids,) = generate(
    model.params,
    model.config,
    [list(prompt.encode())],
    count,
    rng=rng,
    sampler=Sampler(
      temperature=temperature,
      vocab_size=model.tokenizer.vocab_size,
      **sampler,
    ),
    stop_ids=[model.tokenizer.eos_id],
  )
  return ids


def text_of(ids):
  return make_model().tokenizer.decode(ids)


class Call:
  """One request to an app, without a client: every message can be watched.

  Args:
    app: ASGI app.
    body: bytes, or JSON values.
  """

  def __init__(self, app, body, *, headers=(), path="/v1/completions"):
    self._app = app
    if not isinstance(body, bytes):
      body = json.dumps(body).encode()
    self._body = [body[i : i + 100] for i in range(0, len(body), 100)] or [b""]
    self.parts_read = 0
    self._left = asyncio.Event()
    self.messages = []
    self._scope = {
      "type": "http",
      "method": "POST",
      "path": path,
      "raw_path": path.encode(),
      "query_string": b"",
      "root_path": "",
      "scheme": "http",
      "http_version": "1.1",
      "client": ("127.0.0.1", 1),
      "headers": [
        (b"host", b"127.0.0.1"),
        (b"content-type", b"application/json"),
        *headers,
      ],
    }

  def start(self):
    self.task = asyncio.ensure_future(
      self._app(self._scope, self._receive, self._send)
    )
    return self

  def leave(self):
    self._left.set()

  async def _receive(self):
    if self.parts_read < len(self._body):
      part = self._body[self.parts_read]
      self.parts_read += 1
      more = self.parts_read < len(self._body)
      return {"type": "http.request", "body": part, "more_body": more}
    await self._left.wait()
    return {"type": "http.disconnect"}

  async def _send(self, message):
    self.messages.append(message)

  async def end(self):
    """Status and body, once the app has returned."""
    async with asyncio.timeout(60):
      await self.task
    return self.status, self.content

  @property
  def status(self):
    return self.messages[0]["status"] if self.messages else None

  @property
  def content(self):
    return b"".join(m.get("body", b"") for m in self.messages).decode()

  @property
  def json(self):
    return json.loads(self.content)
