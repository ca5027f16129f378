"""`gdn2 serve` as a process: OpenAI's client, 200 at once, signals."""

import asyncio
import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest

from gdn2_jax.interop.folder import save_model
from tests.eval.plain import make_model
from tests.faults.child import environment
from tests.serve.test_metrics import read
from tests.tiny_run import ROOT, run_many

pytestmark = pytest.mark.slow

TOKEN = "0123456789abcdef"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
ENDLESS = {"prompt": "de f", "max_tokens": 1_000_000, "temperature": 0}


class Server:
  """A process with the tiny model, once it is ready."""

  def __init__(self, folder, *flags):
    (folder / "token").write_text(TOKEN)
    self.process = subprocess.Popen(
      [
        *(sys.executable, "-m", "gdn2_jax.serve", f"--model={folder / 'tiny'}"),
        *("--port=0", "--slots=8", "--prefill_piece=32"),
        *("--max_prompt_tokens=200", "--max_output_tokens=1000000"),
        *(f"--token_file={folder / 'token'}", *flags),
      ],
      cwd=ROOT,
      env=environment() | {"XDG_CACHE_HOME": str(folder / "cache")},
      stderr=subprocess.PIPE,
      text=True,
    )
    self.lines = []
    self._reader = threading.Thread(target=self._read)
    self._reader.start()
    self.url = self.wait_for(r"^\[ready at (http://127\.0\.0\.1:\d+)\]$")[1]

  def _read(self):
    with self.process.stderr as stream:
      for line in stream:
        self.lines.append(line)

  def wait_for(self, pattern):
    end = time.monotonic() + 120
    while time.monotonic() < end:
      for line in list(self.lines):
        if found := re.search(pattern, line):
          return found
      assert self.process.poll() is None, self.lines
      time.sleep(0.02)
    raise AssertionError(f"no {pattern!r} in {self.lines}")

  def end(self):
    code = self.process.wait(60)
    self._reader.join()
    return code

  def kill(self):
    self.process.kill()
    self.end()

  def metrics(self):
    text = httpx.get(f"{self.url}/metrics", headers=HEADERS).text
    return read(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder, model = tmp_path_factory.mktemp("serve"), make_model()
  save_model(folder / "tiny", model.params, model.config, model.tokenizer)
  return folder


@pytest.fixture(scope="module")
def server(folder):
  server = Server(folder)
  yield server
  server.kill()


def endless(server):
  """A stream of an answer that does not end; keep its iterator of lines."""
  return httpx.stream(
    *("POST", f"{server.url}/v1/completions"),
    json=ENDLESS | {"stream": True},
    headers=HEADERS,
    timeout=60,
  )


def programs(folder):
  files = (folder / "cache" / "gdn2_jax" / "jax").iterdir()
  return {path.name for path in files if path.name.endswith("-cache")}


def test_the_client_of_openai(server):
  compiling = server.wait_for(r"^\[compiling: (.*)\]$")[1]
  assert compiling == "reading 16, 32 tokens of a prompt, decoding 8 rows"
  options = {"base_url": f"{server.url}/v1", "max_retries": 0}
  with openai.OpenAI(api_key=TOKEN, **options) as client:
    assert [model.id for model in client.models.list()] == ["tiny"]
    ask = {"model": "tiny", "prompt": "de f", "max_tokens": 12, "seed": 3}
    whole = client.completions.create(**ask)
    assert whole.object == "text_completion" and whole.usage.total_tokens == 16
    (choice,) = whole.choices
    assert choice.finish_reason in ("stop", "length")
    events = list(
      client.completions.create(
        stream=True, stream_options={"include_usage": True}, **ask
      )
    )
    text = "".join(event.choices[0].text for event in events[:-1])
    assert text == choice.text and events[-1].usage == whole.usage

    first = client.completions.create(extra_body={"session": "new"}, **ask)
    assert first.choices[0].text == choice.text
    name = first.model_extra["session"]
    more = client.completions.create(
      extra_body={"session": name}, **ask | {"prompt": "x"}
    )
    assert more.model_extra["session"] == name
    assert more.usage.prompt_tokens == 1

    with pytest.raises(openai.BadRequestError, match="max_tokens=0: expected"):
      client.completions.create(**ask | {"max_tokens": 0})
    with pytest.raises(openai.BadRequestError, match="logprobs=1: expected"):
      client.completions.create(logprobs=1, **ask)
    with pytest.raises(openai.NotFoundError, match="no such session"):
      client.completions.create(extra_body={"session": "none"}, **ask)
    with pytest.raises(openai.NotFoundError, match="chat/completions"):
      client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hello"}]
      )
  with openai.OpenAI(api_key="wrong", **options) as client:
    with pytest.raises(openai.AuthenticationError):
      client.models.list()


def body_of(i):
  return {
    "prompt": "def f(x): return "[: 3 + i % 13] * (1 + (i % 3) * 3),
    "max_tokens": 2 + i % 17,
    "temperature": (0, 0.8, 1.2)[i % 3],
    "top_p": (1, 0.9)[i % 2],
    "seed": i % 40,
  }


async def text_of(client, body):
  response = await client.post("/v1/completions", json=body)
  assert response.status_code == 200, response.text
  return response.json()["choices"][0]["text"]


def open_client(server):
  return httpx.AsyncClient(
    base_url=server.url,
    headers=HEADERS,
    timeout=120,
    limits=httpx.Limits(max_connections=None),
  )


async def streamed(client, body, pause=0.0, events=None):
  """Text of a stream; with `events` it is cut off after so many."""
  text, count = "", 0
  async with client.stream(
    "POST", "/v1/completions", json=body | {"stream": True}
  ) as response:
    assert response.status_code == 200
    async for line in response.aiter_lines():
      if not line.startswith("data: {"):
        continue
      text += json.loads(line[6:])["choices"][0]["text"]
      count += 1
      if count == events:
        return None
      await asyncio.sleep(pause)
  return text


def test_two_hundred_at_once(server):
  """Slow readers, streams cut off, prompts too long; none disturbs another."""
  before = server.metrics()

  async def one(client, i, alone):
    kind = i % 10
    if kind == 9:
      assert await streamed(client, ENDLESS, events=2) is None
      return "cut"
    if kind == 8:
      response = await client.post(
        "/v1/completions", json={"prompt": "a" * 201}
      )
      assert response.status_code == 400 and "201 tokens" in response.text
      return "refused"
    if kind == 7:
      assert await streamed(client, body_of(i), pause=0.05) == alone[i]
    elif kind >= 5:
      assert await streamed(client, body_of(i)) == alone[i]
    else:
      assert await text_of(client, body_of(i)) == alone[i]
    return "answered"

  async def main():
    async with open_client(server) as client:
      alone = [
        await text_of(client, body_of(i)) if i % 10 < 8 else None
        for i in range(200)
      ]
      assert len(set(alone)) > 30
      return await asyncio.gather(*(one(client, i, alone) for i in range(200)))

  kinds = asyncio.run(main())
  assert [kinds.count(k) for k in ("answered", "refused", "cut")] == [
    *(160, 20, 20),
  ]
  end = time.monotonic() + 60
  while time.monotonic() < end:
    after = server.metrics()
    if not after["gdn2_running_requests",] + after["gdn2_waiting_requests",]:
      break
  assert after["gdn2_running_requests",] == 0
  assert after["gdn2_waiting_requests",] == 0
  for status, count in (("200", 320), ("400", 20), ("499", 20)):
    name = "gdn2_requests_total", status
    assert after[name] - before.get(name, 0) == count


def test_refusals_at_the_start_are_one_line(server, folder):
  model = f"--model={folder / 'tiny'}"
  port = server.url.rsplit(":", 1)[1]
  calls = {
    "--workdir is missing": [],
    "--port=70000: expected 0 to 65535": [model, "--port=70000"],
    "--slots=0: expected a number > 0": [model, "--slots=0"],
    f"--port={port}: expected a free address": [model, f"--port={port}"],
    "--token_file=none: expected a file": [model, "--token_file=none"],
    "unexpected argument 'x'": [model, "x"],
  }
  results = run_many("gdn2_jax.serve.__main__", [*calls.values(), ["--help"]])
  *refused, shown = results
  for message, got in zip(calls, refused, strict=True):
    assert got["code"] == 1 and message in got["err"] + got["out"], got
    assert (got["err"] + got["out"]).count("\n") == 1
  assert shown["code"] == 0
  for taught in ("no chat template", "curl http", "--token_file", "--slots"):
    assert taught in shown["out"]


def test_a_signal_under_load_loses_nothing(server):
  """New requests are refused, all others are answered, the status is 0."""
  bodies = [body_of(i) | {"max_tokens": 150} for i in range(24)]

  async def main():
    async with open_client(server) as client:
      alone = [await text_of(client, body) for body in bodies]
      begun = server.metrics()["gdn2_queue_seconds_count",]
      tasks = [
        asyncio.ensure_future(text_of(client, body)) for body in bodies * 3
      ]
      waiting = came = 0
      while came < len(tasks):
        now = await asyncio.to_thread(server.metrics)
        waiting = now["gdn2_waiting_requests",]
        came = now["gdn2_queue_seconds_count",] - begun + waiting
      assert waiting > 8
      server.process.send_signal(signal.SIGTERM)
      await asyncio.to_thread(server.wait_for, r"^\[stopping: \d+ requests")
      with contextlib.suppress(httpx.ConnectError):  # if all is done already
        late = await client.post("/v1/completions", json=bodies[0])
        assert late.status_code == 503 and "retry-after" in late.headers
      assert await asyncio.gather(*tasks) == alone * 3

  asyncio.run(main())
  assert server.end() == 0
  assert not any("Traceback" in line for line in server.lines)
  assert not any("def f" in line for line in server.lines)


def test_the_end_has_a_deadline_and_a_second_signal(server, folder):
  """The second start compiles nothing."""
  before = programs(folder)
  server = Server(folder, "--stop_timeout=0.5")
  try:
    with endless(server) as response:
      lines = response.iter_lines()
      next(lines)
      server.process.send_signal(signal.SIGINT)
      *_, last = (line for line in lines if line)
    assert '"code": "stopping"' in last
    assert server.end() == 0
  finally:
    server.kill()
  assert before and programs(folder) == before

  server = Server(folder)
  try:
    with endless(server) as response:
      lines = response.iter_lines()
      next(lines)
      server.process.send_signal(signal.SIGTERM)
      server.wait_for(r"^\[stopping: 1 requests")
      server.process.send_signal(signal.SIGTERM)
      assert server.end() == 128 + signal.SIGTERM
  finally:
    server.kill()
