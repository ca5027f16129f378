"""Refusals before and around the answers: each a line of JSON, none wrong."""

import asyncio

import pytest

from tests.serve.conftest import Call, ask, complete, error_of, until

TOKEN = "a token of some length"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


def test_a_token_is_compared(open_client):
  client = open_client(guarded={"token": TOKEN})
  for headers in (
    {},
    {"Authorization": "Bearer wrong"},
    {"Authorization": TOKEN},
    {"Authorization": "Bearer \u00fc".encode()},
  ):
    for path in ("/v1/models", "/metrics", "/nowhere"):
      response = client.get(path, headers=headers)
      assert "expected 'Bearer TOKEN'" in error_of(response, 401)
      assert response.headers["www-authenticate"] == "Bearer"
      assert TOKEN not in response.text
  assert client.get("/v1/models", headers=BEARER).status_code == 200
  assert client.get("/health").status_code == 200
  response = client.post(
    "/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers=BEARER
  )
  assert response.status_code == 200


def test_a_web_page_cannot_use_the_server(open_client):
  """Neither by a name of its own, nor without the question of the browser."""
  hosts = frozenset({"localhost", "127.0.0.1", "[::1]"})
  client = open_client(guarded={"hosts": hosts})
  for host in ("localhost", "127.0.0.1:8000", "[::1]:8000", "[::1]"):
    assert client.get("/health", headers={"Host": host}).status_code == 200
  for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil:80", ""):
    response = client.get("/health", headers={"Host": host})
    assert "Host=" in error_of(response, 403)
  for kind in ("text/plain", "application/x-www-form-urlencoded"):
    response = client.post(
      "/v1/completions",
      content=b'{"prompt": "a"}',
      headers={"Content-Type": kind},
    )
    assert f'Content-Type="{kind}": expected' in error_of(response, 415)


def test_unknown_routes_and_methods(client):
  assert "/v1/chat/completions" in error_of(
    client.post("/v1/chat/completions", json={}), 404
  )
  error_of(client.get("/v1/completions"), 405)
  error_of(client.get("/v1/models/gpt"), 404)
  error_of(client.delete("/v1/sessions/none"), 404)


def test_the_body_is_measured_while_it_comes(make):
  """Without a length in the header, and no more of it is read than needed."""
  app = make(max_body_bytes=1000)

  async def main():
    call = Call(app, {"prompt": "a" * 100_000}).start()
    status, _ = await call.end()
    assert status == 413
    assert "--max_body_bytes=1000" in call.json["error"]["message"]
    assert call.parts_read == 11  # of 100 bytes each

  asyncio.run(main())


def test_limits_of_tokens(open_client):
  client = open_client(max_prompt_tokens=5, max_output_tokens=7)
  response = ask(client, prompt="123456")
  message = error_of(response, 400)
  assert message == ("prompt: 6 tokens, expected at most --max_prompt_tokens=5")
  assert response.json()["error"]["code"] == "context_length_exceeded"
  assert "--max_output_tokens=7" in error_of(ask(client, max_tokens=8), 400)
  surrogate = client.post(
    "/v1/completions",
    content=b'{"prompt": "\\ud800"}',
    headers={"Content-Type": "application/json"},
  )
  assert "lone surrogate" in error_of(surrogate, 400)
  assert error_of(ask(client, prompt=""), 400).startswith("prompt: no tokens")
  assert complete(client, prompt="12345", max_tokens=7, seed=1)


def test_no_more_than_max_concurrent_run_or_wait(make):
  app = make(max_concurrent=4, max_output_tokens=100_000)
  endless = {"prompt": "de f", "max_tokens": 100_000, "temperature": 0}

  async def main():
    two = Call(app, endless | {"n": 2}).start()
    one = Call(app, endless).start()
    await until(lambda: app.service.answers == 3)
    refused = Call(app, endless | {"n": 2}).start()
    assert (await refused.end())[0] == 429
    headers = dict(refused.messages[0]["headers"])
    assert headers[b"retry-after"] == b"1"
    message = refused.json["error"]["message"]
    assert message.startswith("3 answers run or wait and 2 are asked for")
    last = Call(app, endless).start()
    await until(lambda: app.service.answers == 4)
    for call in (two, one, last):
      call.leave()
      await call.end()
    await until(lambda: app.service.answers == 0)
    short = Call(app, endless | {"max_tokens": 1, "n": 4}).start()
    assert (await short.end())[0] == 200

  asyncio.run(main())


def test_the_log_has_no_text(client):
  secret = "attack at dawn"
  ask(client, prompt=secret, max_tokens=3, seed=1)
  ask(client, prompt=secret, max_tokens=-1, stop=[secret])
  client.get("/nowhere%0A127.0.0.1 'GET /forged' 200")
  good, bad, odd = client.server.lines
  assert "'POST /v1/completions' 200 14+3 tokens 0." in good
  assert "'POST /v1/completions' 400 0+0 tokens 0." in bad
  assert "\n" not in odd and odd.endswith(" s") and " 404 " in odd
  assert secret not in good + bad


def test_health_tells_the_phases(open_client, make, monkeypatch):
  client = open_client()
  assert client.get("/health").json() == {"status": "ready"}
  client.server.stopping = True
  response = client.get("/health")
  assert (response.status_code, response.json()) == (
    503,
    {"status": "stopping"},
  )
  assert "stopping" in error_of(ask(client), 503)
  client.server.stopping = False
  worker = client.server.service.worker
  monkeypatch.setattr(worker, "ready", False)
  response = client.get("/health")
  assert (response.status_code, response.json()) == (
    503,
    {"status": "starting"},
  )
  response = ask(client)
  assert "not ready" in error_of(response, 503)
  assert response.headers["retry-after"] == "5"


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny"])
def test_models(client, path):
  body = client.get(path).json()
  if path == "/v1/models":
    assert body["object"] == "list"
    (body,) = body["data"]
  assert body["id"] == "tiny" and body["object"] == "model"
  assert isinstance(body["created"], int) and body["owned_by"] == "gdn2_jax"
