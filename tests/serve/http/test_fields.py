"""Fields of requests: what is accepted, and refusals by name."""

import json

import pytest

from gdn2_jax.inference.sampling import Sampler
from gdn2_jax.serve.http.errors import ApiError
from gdn2_jax.serve.http.fields import read_fields
from gdn2_jax.serve.limits import Limits

LIMITS = Limits(max_output_tokens=50, max_concurrent=6)


def read(body):
  if not isinstance(body, bytes):
    body = json.dumps(body).encode()
  return read_fields(body, "tiny", 259, LIMITS)


def test_defaults_are_those_of_the_interface():
  fields = read({"prompt": "a"})
  assert fields.prompts == ["a"] and fields.max_tokens == 16
  assert fields.sampler == Sampler(temperature=1.0, top_p=1.0)
  assert (fields.n, fields.stops, fields.seed) == (1, (), None)
  assert not (fields.stream or fields.include_usage or fields.session)


def test_fields_that_ask_for_nothing_are_accepted():
  fields = read(
    {
      "model": "tiny",
      "prompt": [[1, 2], [3]],
      "echo": False,
      "logprobs": None,
      "best_of": 1,
      "presence_penalty": 0.0,
      "frequency_penalty": 0,
      "logit_bias": {},
      "suffix": None,
      "user": "someone",
      "n": 3,
      "stop": ["a", "b"],
      "seed": 2**32 - 1,
      "temperature": 0,
      "top_k": 5,
      "stream": True,
      "stream_options": {"include_usage": True},
    }
  )
  assert fields.prompts == [[1, 2], [3]] and fields.n == 3
  assert fields.sampler == Sampler(temperature=0.0, top_k=5)
  assert fields.stops == ("a", "b") and fields.include_usage


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"prompt": None}, "prompt=null: expected a string, token ids"),
    ({"prompt": []}, "prompt=[]: expected a string"),
    ({"prompt": [[]]}, "prompt=[[]]: expected a string"),
    ({"prompt": [259]}, "prompt=259: expected ids from 0 to 258"),
    ({"prompt": [True]}, "prompt=true: expected ids"),
    ({"prompt": [1, "a"]}, 'prompt="a": expected ids'),
    ({"prompt": [[1], 2]}, "prompt=[[1], 2]: expected a string"),
    ({"prompt": ["a"] * 7}, "at most --max_concurrent=6 answers"),
    ({"max_tokens": 51}, "max_tokens=51: expected an integer from 1 to --max_"),
    ({"max_tokens": 0}, "max_tokens=0"),
    ({"max_tokens": 1.5}, "max_tokens=1.5"),
    ({"max_tokens": True}, "max_tokens=true"),
    ({"max_tokens": 10**400}, "max_tokens=1000"),
    ({"temperature": -1}, "temperature=-1: expected 0 (greedy) or"),
    ({"temperature": 1e-9}, "temperature=1e-09"),
    ({"temperature": "hot"}, 'temperature="hot"'),
    ({"top_p": 0}, "top_p=0: expected a number with 0 < top_p <= 1"),
    ({"top_k": 260}, "top_k=260: expected an integer from 0 (all) to 259"),
    ({"seed": -1}, "seed=-1: expected an integer from 0 to 2**32 - 1"),
    ({"n": 7}, "n=7: expected an integer from 1 to --max_concurrent=6"),
    ({"n": 4, "prompt": ["a", "b"]}, "got 2 prompts with n=4"),
    ({"stop": ""}, 'stop="": expected a string or up to 4'),
    ({"stop": ["a"] * 5}, "stop="),
    ({"stop": 3}, "stop=3"),
    ({"stream": 1}, "stream=1: expected true or false"),
    ({"stream_options": {"include_usage": True}}, 'together with "stream"'),
    ({"stream": True, "stream_options": {"x": 1}}, 'stream_options={"x": 1}'),
    ({"echo": True}, "echo=true: expected nothing, this server does not"),
    ({"echo": 0}, "echo=0: expected nothing"),
    ({"logprobs": 0}, "logprobs=0: expected nothing"),
    ({"best_of": 2}, "best_of=2"),
    ({"presence_penalty": 0.5}, "presence_penalty=0.5"),
    ({"frequency_penalty": 1}, "frequency_penalty=1"),
    ({"logit_bias": {"1": 2}}, 'logit_bias={"1": 2}'),
    ({"suffix": "x"}, 'suffix="x"'),
    ({"tools": []}, "tools=[]: expected no such field"),
    ({"max_token": 3}, "max_token=3: expected no such field"),
    ({"session": 3}, "session=3: expected a string"),
    ({"session": "new", "n": 2}, 'session="new": expected one prompt and n=1'),
    ({"user": 3}, "user=3"),
  ],
)
def test_refusals_name_field_value_and_what_was_expected(change, message):
  with pytest.raises(ApiError) as refused:
    read({"prompt": "a"} | change)
  error = refused.value.body["error"]
  assert message in error["message"] and "\n" not in error["message"]
  assert refused.value.status == 400 and len(error["message"]) < 300
  assert error["type"] == "invalid_request_error"
  assert error["param"] in change or error["param"] == "prompt"


@pytest.mark.parametrize(
  "body",
  [
    b"",
    b"{",
    b"\xff",
    b"[" * 100_000,
    b'{"prompt": NaN}',
    b"[1]",
    b'{"prompt": "a", "seed": ' + b"9" * 9999 + b"}",
  ],
)
def test_what_is_no_json_object_is_refused(body):
  with pytest.raises(ApiError, match=r"^body: expected"):
    read(body)


def test_another_model_is_not_found():
  with pytest.raises(ApiError) as refused:
    read({"prompt": "a", "model": "gpt"})
  assert refused.value.status == 404
  assert str(refused.value) == 'model="gpt": no such model, expected "tiny"'
