"""Limits of the server, each of them a flag of the same name."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """Bounds on what clients may ask for.

  Attributes:
    max_prompt_tokens: tokens of one prompt.
    max_output_tokens: tokens of one answer.
    max_body_bytes: bytes of the body of a request.
    max_concurrent: answers that run or wait, a request with several prompts
      or n > 1 counting as many.
    request_timeout: seconds from the first byte of a request to the last one
      of its answer.
    stop_timeout: seconds that requests get to finish after a signal.
    max_sessions: sessions that are kept; 0 refuses sessions.

  Raises:
    ValueError: a limit outside its range, by the name of its flag.
  """

  max_prompt_tokens: int = 8192
  max_output_tokens: int = 1024
  max_body_bytes: int = 1 << 20
  max_concurrent: int = 256
  request_timeout: float = 300.0
  stop_timeout: float = 30.0
  max_sessions: int = 64

  def __post_init__(self):
    for field in dataclasses.fields(self):
      name, value = field.name, getattr(self, field.name)
      if name in ("max_sessions", "stop_timeout"):
        good, expected = value >= 0, ">= 0"
      else:
        good, expected = value > 0, "> 0"
      if not (good and math.isfinite(value)):
        raise ValueError(f"--{name}={value}: expected a number {expected}")

  @property
  def max_length(self) -> int:
    """Tokens of a prompt and its answer together."""
    return self.max_prompt_tokens + self.max_output_tokens
