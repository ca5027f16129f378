"""Scores of a model on needle-in-a-haystack samples.

Three of them, of the same prompts:

  generated  the greedy continuation of up to 128 tokens contains the value
             (RULER's string_match)
  forced     every token of the value is the most probable one, given the
             prompt and the tokens of the value before it
  gain       ln p(value | prompt) - ln p(value | prompt with another value in
             the needle), in nats: the information that the model takes from
             the needle, a number where the other two are still 0
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gdn2_jax.eval.rows import RowStore
from gdn2_jax.eval.ruler.generators import ANSWER_TOKENS, samples
from gdn2_jax.eval.ruler.tasks import TASKS, Haystacks, Sample, other_value
from gdn2_jax.eval.scoring import greedy, score
from gdn2_jax.interop.folder import Model

SCORES = ("generated", "forced", "gain")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """Cells to evaluate, each a task at a length.

  Attributes:
    generator: "ruler" or "lm_eval".
    tasks: names of tasks.
    lengths: tokens of prompt and answer together.
    samples: of each cell.
    seed: of the random generator of each cell.
    scores: some of SCORES.
    batch_size: rows per dispatch.
  """

  generator: str
  tasks: tuple[str, ...]
  lengths: tuple[int, ...]
  samples: int
  seed: int
  scores: tuple[str, ...]
  batch_size: int

  def cells(self) -> Iterator[tuple[str, int]]:
    """All (task, length), the shortest first."""
    for length in self.lengths:
      for task in self.tasks:
        yield task, length


def key_of(task: str, length: int, index: int) -> str:
  """Key of a sample's row."""
  return f"{task}/{length}/{index}"


def evaluate(
  model: Model,
  haystacks: Haystacks,
  plan: Plan,
  store: RowStore,
  *,
  facts: dict[str, Any],
  on_rows: Callable[[str, int, int], Any] | None = None,
) -> None:
  """Adds the rows of a plan that the store does not have.

  Args:
    model: with a tokenizer, which counts the lengths.
    haystacks: made for the generator of the plan.
    plan: cells and scores.
    store: a row for each sample, under `key_of`.
    facts: further fields of every row.
    on_rows: called as on_rows(task, length, rows) after each batch.

  Raises:
    ValueError: a length that no sample of a task fits, before any computation.
    NonFiniteError: a model whose logits are not finite.
  """
  for task, length in plan.cells():
    next(_samples(model, haystacks, plan, task, length))
  size = min(plan.batch_size, plan.samples)
  for task, length in plan.cells():
    batch = []
    for index, sample in _samples(model, haystacks, plan, task, length):
      if key_of(task, length, index) in store:
        continue
      batch.append((index, sample))
      if len(batch) == size:
        _add(model, plan, store, task, length, batch, facts, size)
        if on_rows:
          on_rows(task, length, len(batch))
        batch = []
    if batch:
      _add(model, plan, store, task, length, batch, facts, size)
      if on_rows:
        on_rows(task, length, len(batch))


def _samples(model, haystacks, plan, task, length):
  return samples(
    plan.generator,
    TASKS[task],
    length,
    plan.samples,
    haystacks,
    lambda text: len(model.tokenizer.encode(text)),
    plan.seed,
  )


def _add(model, plan, store, task, length, batch, facts, size) -> None:
  """Scores a batch and adds its rows."""
  found = score_samples(
    model, [sample for _, sample in batch], plan.scores, size
  )
  for (index, sample), scores in zip(batch, found, strict=True):
    tokens = scores.pop("prompt_tokens")
    row = {
      "task": task,
      "length": length,
      "index": index,
      "prompt_tokens": tokens,
      "fill": round((tokens + ANSWER_TOKENS) / length, 4),
      "depth": round(sample.depth, 4),
      "value": sample.value,
    }
    store.add(key_of(task, length, index), row | scores | facts)


def score_samples(
  model: Model, batch: Sequence[Sample], scores: Sequence[str], batch_size: int
) -> list[dict[str, Any]]:
  """Scores of samples by name, and the tokens of each prompt.

  A batch that is not full is filled with its last sample, so that one program
  serves all batches.
  """
  padded = [*batch, *[batch[-1]] * (batch_size - len(batch))]
  encode = model.tokenizer.encode
  prompts = [encode(sample.prompt) for sample in padded]
  rows: list[dict[str, Any]] = [
    {"prompt_tokens": len(prompt)} for prompt in prompts[: len(batch)]
  ]
  if "generated" in scores:
    texts = greedy(model, prompts, ANSWER_TOKENS, batch_size=batch_size)
    for row, sample, text in zip(rows, batch, texts, strict=False):
      row["generated"] = sample.value.lower() in text.lower()
      row["text"] = text
  if "forced" in scores or "gain" in scores:
    contexts, values = zip(
      *(_split(encode, s.prompt, s.value) for s in padded), strict=True
    )
    true = score(model, contexts, values, batch_size=batch_size)
    for row, value in zip(rows, true, strict=False):
      row["forced"] = value.is_greedy
      row["value_logprob"] = value.logprob
      row["value_tokens"] = len(value.token_logprobs)
  if "gain" in scores:
    others = [s.with_value(other_value(s)) for s in padded]
    contexts = [
      _split(encode, other.prompt, s.value)[0]
      for other, s in zip(others, padded, strict=True)
    ]
    false = score(model, contexts, values, batch_size=batch_size)
    for row, value in zip(rows, false, strict=False):
      row["gain"] = row["value_logprob"] - value.logprob
  return rows


def _split(encode, prompt: str, value: str) -> tuple[list[int], list[int]]:
  """Tokens of a prompt, and those of the value behind it.

  Where a token spans the border it belongs to the value.
  """
  whole, before = encode(f"{prompt} {value}"), encode(prompt)
  same = 0
  while same < len(before) and whole[same] == before[same]:
    same += 1
  return whole[:same], whole[same:]
