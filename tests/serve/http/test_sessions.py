"""Sessions: what was read is not read again, and nothing else changes."""

import asyncio

import jax
import numpy as np
import pytest

from gdn2_jax.serve.conversation import Sessions
from tests.eval.plain import make_model
from tests.serve.conftest import (
  Call,
  ask,
  complete,
  error_of,
  generated,
  text_of,
  until,
)

GREEDY, DRAWN = {"temperature": 0.0}, {"temperature": 1.0, "seed": 4}


def turn(client, **fields):
  """Text, session and usage of a request of a session."""
  response = ask(client, **fields)
  assert response.status_code == 200, response.text
  body = response.json()
  (choice,) = body["choices"]
  return choice["text"], body["session"], body["usage"]


def kept(client, name):
  return client.server.service.sessions._kept[name]


@pytest.mark.parametrize("settings", [GREEDY, DRAWN])
def test_two_requests_are_one(client, settings):
  whole = complete(client, max_tokens=14, **settings)
  first, name, usage = turn(client, session="new", max_tokens=5, **settings)
  assert usage["prompt_tokens"] == 4 and len(name) > 16
  # The seed is that of the session.
  second, again, usage = turn(
    client,
    session=name,
    prompt="",
    max_tokens=9,
    temperature=settings["temperature"],
  )
  assert again == name and usage["prompt_tokens"] == 0
  conversation = kept(client, name)
  assert conversation.tokens == 4 + 14 and conversation.draws == 14
  assert conversation.state.position.tolist() == [4 + 14 - 1]
  ids = generated("de f", 14, **settings)
  assert conversation.tail[-14:] == tuple(ids)
  # A character may end in the second one.
  assert (first + second).replace("\ufffd", "") == whole.replace("\ufffd", "")


def test_new_text_follows_the_answer(client):
  """As if the whole text had been the prompt, of which only the end is sent."""
  model = make_model()
  _, name, _ = turn(client, session="new", max_tokens=6, temperature=0)
  more, _, usage = turn(
    client, session=name, prompt=" = x", max_tokens=5, temperature=0
  )
  assert usage["prompt_tokens"] == 4
  ids = model.tokenizer.encode("de f") + generated("de f", 6)
  whole = ids + model.tokenizer.encode(" = x")
  assert more == complete(client, prompt=whole, max_tokens=5, temperature=0)
  assert kept(client, name).tokens == 4 + 6 + 4 + 5


def test_after_a_stop_the_text_goes_on_where_it_was_shown(client):
  text = complete(client, max_tokens=20, temperature=0)
  stop = text[6:8]
  shown = text[: text.index(stop)]
  got, name, _ = turn(
    client, session="new", max_tokens=20, temperature=0, stop=stop
  )
  assert got == shown
  conversation = kept(client, name)
  assert conversation.state is None  # read with the next request
  assert text_of(conversation.pending) == "de f" + shown
  more, _, _ = turn(
    client, session=name, prompt="y", max_tokens=4, temperature=0
  )
  want = complete(client, prompt=f"de f{shown}y", max_tokens=4, temperature=0)
  assert more == want


def test_a_request_that_fails_leaves_its_session(make):
  app = make(max_output_tokens=100_000)

  async def main():
    body = {"prompt": "de f", "max_tokens": 4, "temperature": 0}
    first = Call(app, body | {"session": "new"}).start()
    await first.end()
    name = first.json["session"]
    before = app.service.sessions._kept[name]
    bits = [np.array(x) for x in _leaves(before)]
    endless = {"prompt": "x", "max_tokens": 100_000, "temperature": 0}
    gone = Call(app, endless | {"session": name, "stream": True}).start()
    await until(lambda: len(gone.messages) > 2)
    busy = Call(app, body | {"session": name}).start()
    assert (await busy.end())[0] == 409
    assert busy.json["error"]["code"] == "session_busy"
    gone.leave()
    await gone.end()
    assert app.service.sessions._kept[name] is before
    for x, y in zip(bits, _leaves(before), strict=True):
      assert (x == np.array(y)).all()
    again = Call(app, body | {"session": name}).start()
    assert (await again.end())[0] == 200
    unkept = Call(app, endless | {"session": "new"}).start()
    await until(lambda: app.service.answers == 1)
    unkept.leave()
    await unkept.end()
    assert len(app.service.sessions) == 1
    await until(lambda: app.service.answers == 0)

  asyncio.run(main())


def _leaves(conversation):
  return jax.tree.leaves(conversation.state)


def test_the_least_recently_used_session_goes(open_client):
  client = open_client(max_sessions=2)
  options = {"max_tokens": 1, "temperature": 0}
  names = [turn(client, session="new", **options)[1] for _ in range(2)]
  turn(client, session=names[0], **options)
  third = turn(client, session="new", **options)[1]
  message = error_of(ask(client, session=names[1]), 404)
  assert 'expected an id that a response gave, or "new"' in message
  assert set(client.server.service.sessions._kept) == {names[0], third}
  assert client.delete(f"/v1/sessions/{third}").json()["deleted"] is True
  error_of(ask(client, session=third), 404)
  none = open_client(max_sessions=0)
  assert "--max_sessions=0" in error_of(ask(none, session="new"), 400)


def test_ids_are_new_and_release_is_needed():
  sessions = Sessions(3)
  name, conversation = sessions.begin("new")
  other, _ = sessions.begin("new")
  assert name != other and len(sessions) == 0
  sessions.keep(name, conversation)
  with pytest.raises(BlockingIOError):
    sessions.begin(name)
  sessions.release(name)
  assert sessions.begin(name) == (name, conversation)
  with pytest.raises(KeyError):
    sessions.begin("none")


def test_a_stream_tells_the_session(client):
  response = ask(
    client, session="new", max_tokens=3, temperature=0, stream=True
  )
  name = response.text.split('"session": "')[1].split('"')[0]
  assert kept(client, name).tokens == 7
