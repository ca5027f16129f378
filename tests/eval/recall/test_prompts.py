"""Prompts of the recall tasks: texts, windows, answers, files."""

import json

import pytest

from gdn2_jax.data.tokenizer.api import BytesTokenizer
from gdn2_jax.eval.recall.tasks import (
  TASKS,
  check_files,
  contains,
  read_examples,
)
from gdn2_jax.eval.recall.window import make_prompt

TOKENIZER = BytesTokenizer()  # a token is a byte
PAGE = "A page. Year: 1983. The end"


def example_of(name, **fields):
  return TASKS[name].make(name, 0, **fields)


def prompt_of(example, window=1000):
  prompt = make_prompt(example, TOKENIZER, window)
  return TOKENIZER.decode(prompt.tokens), prompt.has_answer


@pytest.mark.parametrize(
  "name, fields, want",
  [
    (
      "swde",
      {
        "text": f"{PAGE}.\nSummary of information above...\nyear:",
        "key": "year",
        "value": "1983",
      },
      "A page. Year: 1983. The end. Year:",
    ),
    (
      "fda",
      {"text": f"{PAGE} year:", "key": "year", "value": "1983"},
      "A page. Year: 1983. The end. Year:",
    ),
    (
      "squad",
      {"text": " Ann is here. Here is ", "value": "Ann"},
      "Ann is here. Here is",
    ),
    (
      "triviaqa",
      {
        "context": "[DOC] [TLE] Paris[PAR] is it.",
        "question": " It is ",
        "answers": ["Paris"],
      },
      "Paris is it. It is",
    ),
    (
      "nq",
      {
        "context": "Water boils at 100 degrees. water boils at",
        "question": "Water boils at",
        "answers": ["100 degrees"],
      },
      "Water boils at 100 degrees. Water boils at",
    ),
    (
      "drop",
      {"context": "33 goals..", "question": "Goals were", "answers": ["33"]},
      "33 goals. Goals were",
    ),
  ],
)
def test_prompts_end_with_the_question_and_no_space(name, fields, want):
  text, has_answer = prompt_of(example_of(name, **fields))
  assert text == want
  assert has_answer


def question(context, answers=("answer",)):
  return example_of("nq", context=context, question="Q", answers=list(answers))


def test_the_window_begins_half_its_length_before_the_answer():
  context = "x" * 100 + "ANSWER" + "y" * 100
  text, has_answer = prompt_of(question(context), window=40)
  assert text == "x" * 20 + "ANSWER" + "y" * 14 + ". Q"
  assert has_answer
  # Near the start it has its whole length, near the end it has not.
  text, _ = prompt_of(question("xxANSWER" + "y" * 100), window=40)
  assert text == "xxANSWER" + "y" * 32 + ". Q"
  text, _ = prompt_of(question("x" * 100 + "ANSWERyy"), window=40)
  assert text == "x" * 20 + "ANSWERyy" + ". Q"


def test_other_answers_are_looked_for_if_the_first_is_not_there():
  context = "x" * 100 + "second" + "y" * 100 + "third" + "z" * 100
  text, has_answer = prompt_of(
    question(context, ["answer", "third", "second"]), window=20
  )
  assert text == "y" * 10 + "third" + "z" * 5 + ". Q" and has_answer
  # Not there at all: the end of the context, as in the published protocol.
  text, has_answer = prompt_of(question(context), window=20)
  assert text == "z" * 10 + ". Q" and not has_answer


def test_pages_are_cut_around_the_key_or_the_value_whichever_is_first():
  for first, second in (("Year", "1983"), ("1983", "Year")):
    text = "x" * 50 + first + "y" * 50 + second + "z" * 50
    prompt, _ = prompt_of(
      example_of("fda", text=text, key="year", value="1983"), window=20
    )
    assert prompt == "x" * 10 + first + "y" * 6 + ". Year:"


def test_a_completion_keeps_its_end():
  text = "Ann " + "x" * 100 + " Here is"
  prompt, has_answer = prompt_of(
    example_of("squad", text=text, value="Ann"), window=20
  )
  assert prompt == text[-20:] and not has_answer


def test_answers_are_contained_in_upper_or_lower_case():
  assert contains(" it is PARIS, I think", ["London", "paris"])
  assert not contains("it is Pari", ["Paris"]) and not contains("", ["a"])
  assert contains("costs $5 (five)", ["$5 (FIVE)"])  # no patterns


def write(folder, name, *rows):
  lines = [json.dumps(row) + "\n" for row in rows]
  (folder / f"{name}.jsonl").write_text("".join(lines))


def test_files_are_read_and_answers_without_a_place_left_out(tmp_path):
  row = {"context": "c", "question": "q", "answers": ["3", "ab"], "id": 7}
  fine = row | {"answers": ["33", "", "34"]}
  write(tmp_path, "drop", row, fine, fine)
  examples, skipped = read_examples(tmp_path, "drop")
  assert [example.index for example in examples] == [1, 2] and skipped == 1
  # An empty alternative would be contained in every text.
  assert examples[0].answers == ("33", "34")
  examples, skipped = read_examples(tmp_path, "drop", limit=2)
  assert [example.index for example in examples] == [1] and skipped == 1
  with pytest.raises(ValueError, match="no example with an answer of two"):
    read_examples(tmp_path, "drop", limit=1)


@pytest.mark.parametrize(
  "name, row, message",
  [
    ("fda", {"text": "t", "key": "k"}, "expected the fields text, key, value"),
    ("fda", {"text": "t", "key": "", "value": "v"}, "key='': expected a str"),
    ("fda", {"text": 1, "key": "k", "value": "v"}, "text=1: expected a string"),
    (
      "nq",
      {"context": "c", "question": "q", "answers": "a"},
      "answers='a': expected a list of strings",
    ),
    (
      "nq",
      {"context": "c", "question": "q", "answers": []},
      r"answers=\[\]: expected a list of strings",
    ),
    ("nq", ["context"], "expected the fields context, question, answers"),
  ],
)
def test_other_fields_are_refused(tmp_path, name, row, message):
  write(tmp_path, name, row)
  with pytest.raises(ValueError, match=f"{name}.jsonl, line 1: {message}"):
    read_examples(tmp_path, name)


def test_missing_files_are_refused_with_the_way_to_make_them(tmp_path):
  write(tmp_path, "swde")
  check_files(tmp_path, ["swde"])
  with pytest.raises(ValueError, match="no such folder"):
    check_files(tmp_path / "none", ["swde"])
  with pytest.raises(ValueError) as error:
    check_files(tmp_path, ["swde", "squad", "nq"])
  message = str(error.value)
  assert "missing squad.jsonl, nq.jsonl" in message and "\n" not in message
  assert (
    "datasets.load_dataset('hazyresearch/based_nq_2048', split='validation')"
    ".to_json('nq.jsonl')"
  ) in message
