"""Fields of a request for completions, each of them checked by name."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from gdn2_jax.inference.sampling import Sampler
from gdn2_jax.serve.http.errors import ApiError, show
from gdn2_jax.serve.limits import Limits

_MAX_STOPS, _MAX_STOP = 4, 200  # strings, characters of one
# Fields of the interface that are not offered, and values that ask for nothing.
_NOT_OFFERED: dict[str, tuple[Any, ...]] = {
  "best_of": (None, 1),
  "echo": (None, False),
  "frequency_penalty": (None, 0),
  "logit_bias": (None, {}),
  "logprobs": (None,),
  "presence_penalty": (None, 0),
  "suffix": (None, ""),
}
_KNOWN = {
  *("model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "seed"),
  *("n", "stop", "stream", "stream_options", "session", "user"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fields:
  """A checked request.

  Attributes:
    prompts: texts or lists of ids, at least one.
    max_tokens: tokens of an answer.
    sampler: temperature, top_k and top_p.
    seed: None if the client leaves it to the server.
    n: answers to each prompt.
    stops: strings that end an answer.
    stream, include_usage: form of the response.
    session: an id, "new", or None.
  """

  prompts: list[str] | list[list[int]]
  max_tokens: int
  sampler: Sampler
  seed: int | None
  n: int
  stops: tuple[str, ...]
  stream: bool
  include_usage: bool
  session: str | None


def read_fields(
  body: bytes, model: str, vocab_size: int, limits: Limits
) -> Fields:
  """Checks the body of a request for completions.

  Args:
    body: JSON.
    model: name of the model that is served.
    vocab_size: ids of the tokenizer.
    limits: bounds of the server.

  Raises:
    ApiError: one line that names the field, its value and what was expected.
  """
  fields = _parse(body)
  for name, value in fields.items():
    if name in _NOT_OFFERED:
      if not any(_same(value, nothing) for nothing in _NOT_OFFERED[name]):
        raise _bad(name, value, "nothing, this server does not offer it")
    elif name not in _KNOWN:
      raise _bad(name, value, "no such field, it is unknown here")
  get = fields.get
  if get("model") not in (None, model):
    raise ApiError(
      404,
      f"model={show(get('model'))}: no such model, expected {show(model)}",
      "model",
      "model_not_found",
    )
  _string_or_none("user", get("user"))
  session = _string_or_none("session", get("session"))
  most = limits.max_output_tokens
  max_tokens = _number(
    "max_tokens",
    get("max_tokens"),
    16,
    lambda x: 1 <= x <= most,
    f"an integer from 1 to --max_output_tokens={most}",
    whole=True,
  )
  n = _number(
    "n",
    get("n"),
    1,
    lambda x: 1 <= x <= limits.max_concurrent,
    f"an integer from 1 to --max_concurrent={limits.max_concurrent}",
    whole=True,
  )
  prompts = _prompts(get("prompt"), vocab_size)
  if len(prompts) * n > limits.max_concurrent:
    raise _bad(
      "prompt" if n == 1 else "n",
      len(prompts) if n == 1 else n,
      f"at most --max_concurrent={limits.max_concurrent} answers together, got "
      f"{len(prompts)} prompts with n={n}",
    )
  if session is not None and len(prompts) * n > 1:
    raise _bad("session", session, "one prompt and n=1 with a session")
  stream = _flag("stream", get("stream"))
  return Fields(
    prompts=prompts,
    max_tokens=max_tokens,
    sampler=_sampler(get, vocab_size),
    seed=_number(
      "seed",
      get("seed"),
      None,
      lambda x: 0 <= x < 1 << 32,
      "an integer from 0 to 2**32 - 1",
      whole=True,
    ),
    n=n,
    stops=_stops(get("stop")),
    stream=stream,
    include_usage=_include_usage(get("stream_options"), stream),
    session=session,
  )


def _parse(body: bytes) -> dict[str, Any]:
  def refuse(constant):
    raise ValueError(f"{constant} is no JSON")

  try:
    fields = json.loads(body.decode("utf-8"), parse_constant=refuse)
  except (ValueError, RecursionError) as error:
    # Without the text around the error: it goes to logs of clients.
    reason = getattr(error, "msg", None) or type(error).__name__
    raise ApiError(400, f"body: expected JSON in UTF-8: {reason}") from None
  if not isinstance(fields, dict):
    raise ApiError(400, f"body: expected a JSON object, got {show(fields)}")
  return fields


def _prompts(value: Any, vocab_size: int) -> list[str] | list[list[int]]:
  expected = "a string, token ids, or a list of strings or of lists of ids"
  if isinstance(value, str):
    return [value]
  if not isinstance(value, list) or not value:
    raise _bad("prompt", value, expected)
  if all(isinstance(item, str) for item in value):
    return value
  lists = value if isinstance(value[0], list) else [value]
  for ids in lists:
    if not isinstance(ids, list) or not ids:
      raise _bad("prompt", value, expected)
    for token in ids:
      if type(token) is not int or not 0 <= token < vocab_size:
        raise _bad("prompt", token, f"ids from 0 to {vocab_size - 1}")
  return lists


def _sampler(get: Callable[[str], Any], vocab_size: int) -> Sampler:
  return Sampler(
    temperature=_number(
      "temperature",
      get("temperature"),
      1.0,
      lambda x: x == 0 or 1e-6 <= x <= 100,
      "0 (greedy) or a number from 1e-6 to 100",
    ),
    top_k=_number(
      "top_k",
      get("top_k"),
      0,
      lambda x: 0 <= x <= vocab_size,
      f"an integer from 0 (all) to {vocab_size}",
      whole=True,
    ),
    top_p=_number(
      "top_p",
      get("top_p"),
      1.0,
      lambda x: 0 < x <= 1,
      "a number with 0 < top_p <= 1",
    ),
  )


def _stops(value: Any) -> tuple[str, ...]:
  stops = [value] if isinstance(value, str) else value or []
  good = isinstance(stops, list) and len(stops) <= _MAX_STOPS
  if not good or not all(
    isinstance(stop, str) and 1 <= len(stop) <= _MAX_STOP for stop in stops
  ):
    raise _bad(
      "stop",
      value,
      f"a string or up to {_MAX_STOPS} of them, of 1 to {_MAX_STOP} characters",
    )
  return tuple(stops)


def _include_usage(value: Any, stream: bool) -> bool:
  if value is None:
    return False
  if (
    not stream or not isinstance(value, dict) or set(value) - {"include_usage"}
  ):
    raise _bad(
      "stream_options",
      value,
      'nothing, or {"include_usage": true} together with "stream": true',
    )
  return _flag("stream_options.include_usage", value.get("include_usage"))


def _flag(name: str, value: Any) -> bool:
  if value is not None and not isinstance(value, bool):
    raise _bad(name, value, "true or false")
  return bool(value)


def _string_or_none(name: str, value: Any) -> str | None:
  if value is not None and not (isinstance(value, str) and value):
    raise _bad(name, value, "a string that is not empty")
  return value


def _number(
  name: str,
  value: Any,
  default: Any,
  good: Callable[[Any], bool],
  expected: str,
  whole: bool = False,
) -> Any:
  if value is None:
    return default
  kinds = (int,) if whole else (int, float)
  if type(value) not in kinds or not good(value):
    raise _bad(name, value, expected)
  return value if whole else float(value)


def _same(value: Any, nothing: Any) -> bool:
  # 0 == False in Python, and 0.0 is a zero of JSON.
  return value == nothing and isinstance(value, bool) == isinstance(
    nothing, bool
  )


def _bad(name: str, value: Any, expected: str) -> ApiError:
  return ApiError(400, f"{name}={show(value)}: expected {expected}", name)
