"""Answers: the shape, the tokens, streams, many at once."""

import asyncio
import json

from gdn2_jax.serve.worker import Ended, Job
from tests.serve.conftest import (
  Call,
  ask,
  complete,
  error_of,
  generated,
  text_of,
  until,
)

# Greedy, this model repeats itself and never ends a document.
ENDLESS = {"prompt": "de f", "max_tokens": 100_000, "temperature": 0}


def test_a_completion_has_the_shape_and_the_text_of_generate(client):
  response = ask(client, max_tokens=12, temperature=0)
  assert response.status_code == 200
  body = response.json()
  assert set(body) == {
    *("id", "object", "created", "model", "choices", "usage"),
  }
  assert body["object"] == "text_completion" and body["model"] == "tiny"
  assert body["id"].startswith("cmpl-") and isinstance(body["created"], int)
  want = generated("de f", 12)
  assert body["choices"] == [
    {
      "index": 0,
      "text": text_of(want),
      "logprobs": None,
      "finish_reason": "length",
    }
  ]
  assert body["usage"] == {
    "prompt_tokens": 4,
    "completion_tokens": 12,
    "total_tokens": 16,
  }


def test_seeds_and_settings_are_those_of_generate(client):
  settings = {"temperature": 0.9, "top_p": 0.8, "top_k": 40, "seed": 5}
  want = text_of(generated("de f", 9, **settings))
  assert complete(client, max_tokens=9, **settings) == want
  assert complete(client, max_tokens=9, **settings) == want
  assert complete(client, prompt=list(b"de f"), max_tokens=9, **settings) == (
    want
  )
  assert complete(client, max_tokens=9, **settings | {"seed": 6}) != want
  # Without a seed each request has its own.
  texts = {complete(client, max_tokens=20) for _ in range(3)}
  assert len(texts) == 3


def test_several_prompts_and_answers(client):
  options = {"max_tokens": 5, "temperature": 1, "seed": 3}
  body = ask(client, prompt=["de f", "x"], n=2, **options).json()
  assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
  want = [
    text_of(generated(prompt, 5, temperature=1.0, seed=3, choice=choice))
    for prompt in ("de f", "x")
    for choice in (0, 1)
  ]
  assert [choice["text"] for choice in body["choices"]] == want
  assert want[0] != want[1]
  assert body["usage"]["prompt_tokens"] == 5
  assert body["usage"]["completion_tokens"] == 20


def test_a_stop_string_ends_an_answer(client):
  text = complete(client, max_tokens=12, temperature=0)
  stop = text[5:7]
  at = text.index(stop)
  response = ask(client, max_tokens=12, temperature=0, stop=["\u1234", stop])
  (choice,) = response.json()["choices"]
  assert choice["text"] == text[:at] and choice["finish_reason"] == "stop"
  assert response.json()["usage"]["completion_tokens"] < 12


def events_of(text):
  """JSON of every event of a stream but its end, which must be there."""
  lines = [line for line in text.split("\n\n") if line]
  assert all(line.startswith("data: ") for line in lines)
  assert lines[-1] == "data: [DONE]"
  return [json.loads(line[6:]) for line in lines[:-1]]


def test_a_stream_joins_to_the_answer(client):
  options = {"prompt": ["de f", "x"], "max_tokens": 40, "temperature": 0}
  whole = ask(client, **options).json()
  response = ask(
    client, stream=True, stream_options={"include_usage": True}, **options
  )
  assert response.headers["content-type"].startswith("text/event-stream")
  *events, last = events_of(response.text)
  assert last["choices"] == [] and last["usage"] == whole["usage"]
  texts, finished = ["", ""], []
  for event in events:
    assert event["object"] == "text_completion" and "usage" not in event
    (choice,) = event["choices"]
    texts[choice["index"]] += choice["text"]
    if choice["finish_reason"]:
      finished.append((choice["index"], choice["finish_reason"]))
  assert texts == [choice["text"] for choice in whole["choices"]]
  assert sorted(finished) == [(0, "length"), (1, "length")]
  assert len(events) > 4  # it came in pieces


def test_tokens_come_while_the_others_are_decoded(make):
  """The first event is there long before the last token."""
  app = make(max_output_tokens=100_000)

  async def main():
    call = Call(
      app,
      ENDLESS | {"stream": True},
    ).start()
    await until(lambda: len(call.messages) > 3)
    assert not call.task.done() and call.status == 200
    call.leave()
    await call.end()

  asyncio.run(main())


def test_among_many_an_answer_is_what_it_is_alone(make, client):
  """Twenty requests at once in three rows, of all kinds of settings."""
  bodies = [
    {
      "prompt": "de f"[: 1 + i % 4] * (1 + 5 * (i % 3)),
      "max_tokens": 3 + 5 * (i % 4),
      "temperature": (0, 0.7, 1.3)[i % 3],
      "top_p": (1, 0.9)[i % 2],
      "seed": i // 2,
    }
    for i in range(20)
  ]
  alone = [complete(client, **body) for body in bodies]
  app = make()

  async def main():
    calls = [Call(app, body).start() for body in bodies]
    await asyncio.gather(*(call.end() for call in calls))
    return [call.json["choices"][0]["text"] for call in calls]

  assert asyncio.run(main()) == alone
  assert app.service.answers == 0


def test_a_client_that_leaves_frees_its_row(make, worker):
  app = make(max_output_tokens=100_000)
  body = ENDLESS

  async def main():
    for stream in (False, True):
      calls = [Call(app, body | {"stream": stream}).start() for _ in range(5)]
      await until(lambda: worker.running == 3)
      assert app.service.answers == 5  # two of them wait
      for call in calls:
        call.leave()
      for call in calls:
        await call.end()
      await until(lambda: app.service.answers == 0 and worker.running == 0)

  asyncio.run(main())
  assert len(app.lines) == 10 and all(" 499 " in line for line in app.lines)


def test_a_cut_ends_what_runs_with_an_error(make):
  app = make(max_output_tokens=100_000)
  body = ENDLESS

  async def main():
    whole = Call(app, body).start()
    stream = Call(app, body | {"stream": True}).start()
    await until(lambda: len(stream.messages) > 2)
    app.stopping = True
    late = Call(app, body).start()
    assert (await late.end())[0] == 503 and late.json["error"]["code"] == (
      "stopping"
    )
    app.cut.set()
    assert (await whole.end())[0] == 503
    await stream.end()
    last = json.loads(stream.content.split("\n\n")[-2][6:])
    assert last["error"]["code"] == "stopping"
    assert not stream.messages[-1]["more_body"]
    await until(lambda: app.service.answers == 0)

  asyncio.run(main())


def test_a_request_takes_no_longer_than_its_timeout(make):
  app = make(max_output_tokens=1_000_000, request_timeout=0.3)
  body = ENDLESS | {"max_tokens": 1_000_000}

  async def main():
    whole = Call(app, body).start()
    stream = Call(app, body | {"stream": True}).start()
    assert (await whole.end())[0] == 408
    message = whole.json["error"]["message"]
    assert "--request_timeout=0.3 seconds" in message
    await stream.end()
    last = json.loads(stream.content.split("\n\n")[-2][6:])
    assert last["error"]["type"] == "timeout_error"
    await until(lambda: app.service.answers == 0)

  asyncio.run(main())
  assert [" 408 " in line for line in app.lines] == [True, True]


def test_an_error_of_the_model_is_that_of_its_request(client, monkeypatch):
  """One request fails, as with logits that are not finite; others go on."""
  worker = client.server.service.worker
  begin = type(worker)._begin

  def fail(self, job: Job):
    if job.prompt == list(b"bad"):
      job.emit(Ended(RuntimeError("secret text")))
    else:
      begin(self, job)

  monkeypatch.setattr(type(worker), "_begin", fail)
  message = error_of(ask(client, prompt="bad"), 500)
  assert message == "the answer failed: RuntimeError"
  assert complete(client, max_tokens=2, temperature=0) == (
    text_of(generated("de f", 2))
  )
  assert client.server.service.answers == 0
