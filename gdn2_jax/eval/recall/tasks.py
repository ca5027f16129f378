"""The six recall tasks: files, fields, prompts and answers.

The protocol is that of "Just read twice" (arXiv 2407.05483), whose data sets
and prompts the paper uses: completions without examples, with the question at
the end of the prompt and no space after it.
"""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

LENGTH = 2048  # tokens of a context and its answer
RESERVE = 50  # of them for the answer
MAX_NEW_TOKENS, STOP = 48, "\n"
SPLIT = "validation"
_SUMMARY = "Summary of information above..."  # ends the pages of SWDE
_MARKERS = re.compile(r"\[(?:PAR|DOC|TLE)\]")  # in the contexts of TriviaQA


@dataclasses.dataclass(frozen=True)
class Example:
  """One question about a text.

  Attributes:
    task: name of the task.
    index: line of its file, from 0.
    context: text that holds the answer.
    question: end of the prompt; "" if the context itself ends with it.
    answers: any of them is right.
    anchors: the window is cut around the first place in the context where one
      of these stands.
    fallbacks: as anchors, in this order, where none of those is found.
  """

  task: str
  index: int
  context: str
  question: str
  answers: tuple[str, ...]
  anchors: tuple[str, ...]
  fallbacks: tuple[str, ...] = ()

  def prompt(self, context: str) -> str:
    """The prompt with a part of the context: `context. question`."""
    if not self.question:
      return context.strip()
    # A cut context may end with the question already.
    while context.lower().endswith(self.question.lower()):
      context = context[: -len(self.question)]
    return context.strip().strip(".").strip() + ". " + self.question


@dataclasses.dataclass(frozen=True)
class Task:
  """Source and format of a task.

  Attributes:
    name: name in results; its file is NAME.jsonl.
    dataset: id of the data set on the Hugging Face hub.
    fields: fields that every line must have; strings, but for "answers".
    make: makes an example from the task, the index and the fields.
  """

  name: str
  dataset: str
  fields: tuple[str, ...]
  make: Callable[..., Example]

  @property
  def file(self) -> str:
    """Name of its file."""
    return f"{self.name}.jsonl"


def _key_value(name: str, index: int, text: str, key: str, value: str):
  """SWDE and FDA: the value of a key in a page."""
  text = text.split(_SUMMARY)[0]
  cue = f"{key}:"
  while text.lower().endswith(cue.lower()):
    text = text[: -len(cue)]
  question = cue[0].upper() + cue[1:]
  return Example(name, index, text, question, (value,), (key, value))


def _completion(name: str, index: int, text: str, value: str):
  """SQuAD: the text breaks off before the answer."""
  return Example(name, index, text, "", (value,), (value,))


def _question(
  name: str, index: int, context: str, question: str, answers: list[str]
):
  """TriviaQA, NQ and DROP: a text and a question in the form of a cloze."""
  context = _MARKERS.sub("", context) if name == "triviaqa" else context
  first, *others = answers
  question = question.strip()
  return Example(
    name, index, context, question, tuple(answers), (first,), tuple(others)
  )


_PAGE = ("text", "key", "value")
_QUESTION = ("context", "question", "answers")
TASKS = {
  task.name: task
  for task in (
    Task("swde", "hazyresearch/based-swde-v2", _PAGE, _key_value),
    Task("squad", "hazyresearch/based-squad", ("text", "value"), _completion),
    Task("fda", "hazyresearch/based-fda", _PAGE, _key_value),
    Task("triviaqa", "hazyresearch/based_triviaqa", _QUESTION, _question),
    Task("nq", "hazyresearch/based_nq_2048", _QUESTION, _question),
    Task("drop", "hazyresearch/based_drop", _QUESTION, _question),
  )
}


def check_files(folder: pathlib.Path, names: Sequence[str]) -> None:
  """Raises ValueError unless the files of all tasks are there."""
  if not folder.is_dir():
    raise ValueError(f"--data={folder}: no such folder")
  missing = [TASKS[n] for n in names if not (folder / TASKS[n].file).is_file()]
  if missing:
    files = ", ".join(task.file for task in missing)
    raise ValueError(
      f"--data={folder}: missing {files}; nothing is downloaded. With network, "
      "`pip install datasets` and, for each, "
      + "; ".join(how_to_make(task) for task in missing)
    )


def how_to_make(task: Task) -> str:
  """Python that makes the file of a task from its public data set."""
  return (
    f"datasets.load_dataset({task.dataset!r}, split={SPLIT!r})"
    f".to_json({task.file!r})"
  )


def read_examples(
  folder: pathlib.Path, name: str, limit: int | None = None
) -> tuple[list[Example], int]:
  """Reads the examples of one task.

  As in the published protocol, an example whose first answer has fewer than
  two characters is left out: no place in the text can be found for it.

  Args:
    folder: folder with the file of the task.
    name: name of the task.
    limit: number of lines to read; None reads all.

  Returns:
    Examples, and the number of those that were left out.

  Raises:
    ValueError: a line is not an object with the fields of the task, or no
      example is left.
  """
  task, examples, skipped = TASKS[name], [], 0
  path = folder / task.file
  with path.open(encoding="utf-8") as lines:
    for index, line in enumerate(lines):
      if limit is not None and index == limit:
        break
      fields = _fields(task, line, f"{path}, line {index + 1}")
      example = task.make(name, index, **fields)
      if len(example.answers[0]) < 2:
        skipped += 1
      else:
        examples.append(example)
  if not examples:
    raise ValueError(f"{path}: no example with an answer of two characters")
  return examples, skipped


def _fields(task: Task, line: str, where: str) -> dict[str, Any]:
  try:
    row = json.loads(line)
  except ValueError:
    raise ValueError(f"{where}: not JSON") from None
  wanted = f"expected the fields {', '.join(task.fields)}"
  if not isinstance(row, dict) or not row.keys() >= set(task.fields):
    raise ValueError(f"{where}: {wanted}")
  for field in task.fields:
    value = row[field]
    if field == "answers":
      valid = isinstance(value, list) and value
      valid = valid and all(isinstance(answer, str) for answer in value)
      kind = "a list of strings"
    else:
      valid, kind = isinstance(value, str), "a string"
    if not valid or (field in ("key", "question") and not value.strip()):
      raise ValueError(f"{where}: {field}={value!r}: expected {kind}")
  # An empty alternative would be found in every text.
  if "answers" in row:
    first, *others = row["answers"]
    row["answers"] = [first, *filter(None, others)]
  return {field: row[field] for field in task.fields}


def contains(text: str, answers: Sequence[str]) -> bool:
  """True if the text has one of the answers, in upper or lower case."""
  return any(_pattern(answer).search(text) for answer in answers)


def find(text: str, anchors: Sequence[str]) -> int | None:
  """Index of the first of the anchors in a text, in upper or lower case."""
  found = [_pattern(anchor).search(text) for anchor in anchors]
  return min((match.start() for match in found if match), default=None)


@functools.lru_cache(maxsize=1024)
def _pattern(text: str) -> re.Pattern[str]:
  return re.compile(re.escape(text), re.IGNORECASE)
