"""The part of a context that a prompt holds: a window around the answer."""

import dataclasses

from gdn2_jax.data.tokenizer.base import Tokenizer
from gdn2_jax.eval.recall.tasks import Example, contains, find


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A prompt and what is known about it.

  Attributes:
    tokens: its ids.
    has_answer: an answer stands in its part of the context.
  """

  tokens: list[int]
  has_answer: bool


def make_prompt(example: Example, tokenizer: Tokenizer, window: int) -> Prompt:
  """The prompt of an example, its context cut to `window` tokens.

  The window begins half its length before the answer, or at the start of the
  context, and ends after `window` tokens or with the context, as in the
  published protocol. Without an answer in the context it is the last half
  window. A context that ends with its own question (SQuAD) keeps its end.

  Args:
    example: context, question and answers.
    tokenizer: tokenizer of the model.
    window: tokens of the context, >= 2.
  """
  context = example.context.strip()
  tokens = tokenizer.encode(context)
  if example.question:
    at = find(context, example.anchors)
    for answer in example.fallbacks:
      at = find(context, [answer]) if at is None else at
    position = len(tokens)
    if at is not None:
      position = len(tokenizer.encode(context[:at]))
    start = max(0, position - window // 2)
  else:
    start = max(0, len(tokens) - window)
  part = tokenizer.decode(tokens[start : start + window])
  return Prompt(
    tokens=tokenizer.encode(example.prompt(part)),
    has_answer=contains(part, example.answers),
  )
