"""Sizes of haystacks for a length in tokens, as RULER and lm-eval choose them.

Both draw all samples of a task and length from one random generator, and both
draw again where a sample is too long. They differ in the search for the size,
in what they count, and in that RULER repeats prose that is too short: prompts
of lm-eval's generator may fill little of the length that they stand for.
"""

import random
from collections.abc import Callable, Iterator

from gdn2_jax.eval.ruler.tasks import Haystacks, Sample, Task

ANSWER_TOKENS = 128  # kept free for the answer
GENERATORS = ("ruler", "lm_eval")
_TRIES = 100  # draws at the smallest size before a sample is given up

CountTokens = Callable[[str], int]


def samples(
  generator: str,
  task: Task,
  length: int,
  count: int,
  haystacks: Haystacks,
  count_tokens: CountTokens,
  seed: int,
) -> Iterator[tuple[int, Sample]]:
  """Yields (index, sample) of up to `count` samples of a task and length.

  Args:
    generator: "ruler", that of NVIDIA RULER (commit c3f5e3b), or "lm_eval",
      that of lm-eval 0.4.13.
    task: one of TASKS.
    length: tokens of prompt and answer together.
    count: samples to draw. lm-eval's generator leaves out those that do not
      fit.
    haystacks: made with `repeats` for "ruler" alone.
    count_tokens: number of tokens of a text.
    seed: of the random generator. RULER's is 42; lm-eval's state depends on
      the tasks before.

  Raises:
    ValueError: no sample fits the length, which RULER's own code does not
      notice: it draws for ever.
  """
  run = {"ruler": _ruler, "lm_eval": _lm_eval}[generator]
  yield from run(
    task, length, count, haystacks, count_tokens, random.Random(seed)
  )


def _ruler(task, length, count, haystacks, count_tokens, rng):
  step = _step(task, length)
  room = length - ANSWER_TOKENS

  def draw(size):
    sample = haystacks.draw(task, size, rng)
    return sample, count_tokens(sample.prompt)

  _, tokens = draw(step)
  per_unit = tokens / step
  # Three times the estimate, because units differ in length.
  low, high = step, max(int(length / per_unit * 3), 2 * step)
  best = step
  while low <= high:
    middle = (low + high) // 2
    if draw(middle)[1] <= room:
      best, low = middle, middle + 1
    else:
      high = middle - 1
  for index in range(count):
    size, tries = best, 0
    while True:
      sample, tokens = draw(size)
      if tokens <= room:
        break
      if size > step:
        size -= step
        continue
      tries += 1
      if tries == _TRIES:
        unit = "words" if task.is_essay else "lines"
        raise ValueError(
          f"length={length}: {task.name} does not fit: with the smallest "
          f"haystack of generator ruler, {size} {unit}, a prompt has {tokens} "
          f"tokens, expected at most {room}, {ANSWER_TOKENS} less than the "
          "length; use a greater length or generator lm_eval"
        )
    yield index, sample


def _lm_eval(task, length, count, haystacks, count_tokens, rng):
  step = _step(task, length)
  size = max(step, task.keys)
  tokens = 0
  while tokens + ANSWER_TOKENS < length:
    sample = haystacks.draw(task, size, rng)
    tokens = count_tokens(sample.text + sample.value)
    if tokens + ANSWER_TOKENS > length:
      size -= step
      break
    if task.is_essay and size > haystacks.essay_words:
      size = haystacks.essay_words
      break
    if size > length:
      raise ValueError(
        f"length={length}: a haystack of {size} units has {tokens} tokens, "
        "expected at least one each: the tokenizer drops text"
      )
    size += step
  size = max(size, task.keys)
  found = False
  for index in range(count):
    for smaller in range(size, 0, -step):
      try:
        sample = haystacks.draw(task, smaller, rng)
      except ValueError:  # fewer lines than needles
        continue
      tokens = count_tokens(sample.text)
      if tokens + ANSWER_TOKENS <= length:
        found = True
        yield index, sample
        break
  if not found:
    raise ValueError(
      f"length={length}: {task.name} does not fit: the smallest prompt has "
      f"{tokens} tokens, expected at most {length - ANSWER_TOKENS}, "
      f"{ANSWER_TOKENS} less than the length"
    )


def _step(task: Task, length: int) -> int:
  """Smallest haystack, and the step of searches: words or lines."""
  if task.is_essay:
    return 500
  return 25 if length >= 4096 else 5
