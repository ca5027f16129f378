"""Needle-in-a-haystack tasks of RULER, and the prompt of one sample.

A needle states a value for a key. It stands at a random depth of a haystack,
and the question at the end asks for the value. The wording, the depths and the
order of random draws are those of NVIDIA RULER (Hsieh et al. 2024,
arXiv:2404.06654, scripts/data/synthetic/niah.py, Apache-2.0), which lm-eval's
generator shares.
"""

import dataclasses
import functools
import random
import uuid
from collections.abc import Callable, Sequence

NOISE = (
  "The grass is green. The sky is blue. The sun is yellow. Here we go. There "
  "and back again."
)
_NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
_TEXT = (
  "A special magic {kind} is hidden within the following text. Make sure to "
  "memorize it. I will quiz you about the {kind} afterwards.\n{context}\nWhat "
  "is the special magic {kind} for {key} mentioned in the provided text?"
)
_ANSWER = "The special magic {kind} for {key} mentioned in the provided text is"
# 40 even depths in percent of the sentences.
_DEPTHS = [round(100 * i / 39) for i in range(40)]
_SHUFFLE_SEED = 42  # of the order of the needles, the same in every sample


@dataclasses.dataclass(frozen=True)
class Task:
  """One needle-in-a-haystack task.

  Attributes:
    name: RULER's and lm-eval's.
    label: name in the paper's tables.
    is_essay: the haystack is prose, its unit a word; else a repeated line.
    kind: of the values, "number" (7 digits) or "uuid".
    keys: needles in the haystack; one of them is asked for.
  """

  name: str
  label: str
  is_essay: bool
  kind: str
  keys: int


TASKS = {
  task.name: task
  for task in (
    Task("niah_single_1", "S-NIAH-1", False, "number", 1),
    Task("niah_single_2", "S-NIAH-2", True, "number", 1),
    Task("niah_single_3", "S-NIAH-3", True, "uuid", 1),
    Task("niah_multikey_1", "MK-NIAH-1", True, "number", 4),
  )
}


@dataclasses.dataclass(frozen=True)
class Sample:
  """One question.

  Attributes:
    text: instruction, haystack with needles, question.
    answer_prefix: begin of the answer, which stands after `text` and a space.
    key: asked for.
    value: the answer.
    depth: place of the needle in the haystack, 0 the begin, 1 the end.
    kind: of the value.
  """

  text: str
  answer_prefix: str
  key: str
  value: str
  depth: float
  kind: str

  @property
  def prompt(self) -> str:
    """Everything that the model reads before it answers."""
    return f"{self.text} {self.answer_prefix}"

  def with_value(self, value: str) -> "Sample":
    """The same question with another value in the needle."""
    needle, other = (
      _NEEDLE.format(kind=self.kind, key=self.key, value=v)
      for v in (self.value, value)
    )
    return dataclasses.replace(
      self, text=self.text.replace(needle, other), value=value
    )


class Haystacks:
  """Source of samples of any size.

  Args:
    keys: words that keys are drawn from.
    essay: words of the prose, in order.
    split: splits a text into sentences.
    repeats: repeat prose that is too short, as RULER does and lm-eval does not.
  """

  def __init__(
    self,
    keys: Sequence[str],
    essay: Sequence[str],
    split: Callable[[str], list[str]],
    *,
    repeats: bool,
  ):
    self._keys = keys
    self._essay = list(essay)
    self._split = split
    self._repeats = repeats
    # A search tries few sizes, and its result serves all samples.
    self._sentences = functools.lru_cache(maxsize=4)(self._sentences_of)

  @property
  def essay_words(self) -> int:
    """Words of the prose."""
    return len(self._essay)

  def draw(self, task: Task, size: int, rng: random.Random) -> Sample:
    """Draws a sample whose haystack has `size` units.

    The numbers of draws from `rng` and their order are RULER's.

    Raises:
      ValueError: a haystack with fewer lines than needles.
    """
    pairs = [
      (rng.choice(self._keys), draw_value(task.kind, rng))
      for _ in range(task.keys)
    ]
    needles = [
      _NEEDLE.format(kind=task.kind, key=key, value=value)
      for key, value in pairs
    ]
    shuffled = list(needles)
    random.Random(_SHUFFLE_SEED).shuffle(shuffled)
    place = self._in_essay if task.is_essay else self._in_noise
    context = place(size, shuffled, rng)
    (asked,) = rng.sample(range(task.keys), 1)
    key, value = pairs[asked]
    at = context.index(needles[asked])
    return Sample(
      text=_TEXT.format(kind=task.kind, context=context, key=key),
      answer_prefix=_ANSWER.format(kind=task.kind, key=key),
      key=key,
      value=value,
      depth=at / max(1, len(context) - len(needles[asked])),
      kind=task.kind,
    )

  def _in_essay(self, size, needles, rng) -> str:
    sentences = self._sentences(size)
    depths = rng.sample(_DEPTHS, len(needles))
    cuts = sorted(int(len(sentences) * (depth / 100)) for depth in depths)
    parts, last = [], 0
    for cut, needle in zip(cuts, needles, strict=True):
      # A part without sentences leaves its space, as in RULER.
      parts += [" ".join(sentences[last:cut]), needle]
      last = cut
    return " ".join([*parts, " ".join(sentences[last:])])

  def _in_noise(self, size, needles, rng) -> str:
    lines = [NOISE] * size
    if size < len(needles):
      raise ValueError(f"size={size}: fewer lines than needles")
    places = sorted(rng.sample(range(size), len(needles)), reverse=True)
    for place, needle in zip(places, needles, strict=True):
      lines.insert(place, needle)
    return "\n".join(lines)

  def _sentences_of(self, size: int) -> list[str]:
    words = self._essay
    if self._repeats and size > len(words):
      words = words * -(-size // len(words))
    return self._split(" ".join(words[:size]).strip())


def draw_value(kind: str, rng: random.Random) -> str:
  """A number of 7 digits or a UUID."""
  if kind == "number":
    return str(rng.randint(10**6, 10**7 - 1))
  return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def other_value(sample: Sample) -> str:
  """Another value than the sample's, the same every time."""
  # Its own generator, so that prompts do not depend on the scores wanted.
  rng = random.Random(f"other than {sample.value}")
  value = sample.value
  while value == sample.value:
    value = draw_value(sample.kind, rng)
  return value
