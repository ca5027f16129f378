"""Prompts against those of RULER's and lm-eval's own generators."""

import json
import pathlib

import pytest

from gdn2_jax.eval.ruler.generators import samples
from gdn2_jax.eval.ruler.tasks import NOISE, TASKS, Haystacks, other_value
from gdn2_jax.eval.ruler.words import Keys, load_keys, short_keys
from gdn2_jax.files import sha256_bytes
from tests.eval.ruler.prompts import count_tokens, haystacks, snapshot

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden.json").read_text())


def hashes(cell: str, count: int, seed: int, keys: Keys) -> list[str]:
  generator, task, length = cell.split("/")
  drawn = samples(
    generator,
    TASKS[task],
    int(length),
    count,
    haystacks(generator, keys),
    count_tokens,
    seed,
  )
  return [
    sha256_bytes(f"{sample.prompt}\n{sample.value}".encode())
    for _, sample in drawn
  ]


@pytest.mark.parametrize("cell", GOLDEN["short lists"])
def test_prompts_are_those_of_the_original(cell):
  want = GOLDEN["short lists"][cell]
  assert len(set(want)) == 25
  assert hashes(cell, len(want), GOLDEN["seed"], short_keys()) == want


@pytest.mark.parametrize("cell", GOLDEN["wonderwords"])
def test_prompts_with_keys_of_wonderwords_are_those_of_the_original(cell):
  pytest.importorskip("wonderwords")
  want = GOLDEN["wonderwords"][cell]
  assert (
    hashes(cell, len(want), GOLDEN["wonderwords seed"], load_keys()) == want
  )


def test_the_list_of_wonderwords_is_the_original():
  pytest.importorskip("wonderwords")
  keys = "\n".join(load_keys())
  assert sha256_bytes(keys.encode()) == GOLDEN["all keys of wonderwords"]


@pytest.mark.parametrize("generator", ["ruler", "lm_eval"])
@pytest.mark.parametrize("name", TASKS)
def test_prompts_fit_and_hold_the_answer_once(generator, name):
  task = TASKS[name]
  source = haystacks(generator)
  for _, sample in samples(generator, task, 1024, 5, source, count_tokens, 1):
    counted = sample.prompt if generator == "ruler" else sample.text
    assert count_tokens(counted) <= 1024 - 128
    assert sample.prompt.count(sample.value) == 1
    assert 0 <= sample.depth <= 1
    assert sample.prompt.count(sample.key) == 3
    other = sample.with_value(other_value(sample))
    assert other.value != sample.value and sample.value not in other.prompt
    assert other.prompt.replace(other.value, sample.value) == sample.prompt


def test_fewer_samples_are_the_first_ones():
  def draw(count):
    source = haystacks("ruler")
    return list(
      samples(
        "ruler", TASKS["niah_single_1"], 600, count, source, count_tokens, 3
      )
    )

  assert draw(6)[:2] == draw(2)


def test_ruler_repeats_prose_and_lm_eval_does_not():
  words = snapshot().words[:700]
  for generator, repeats in (("ruler", True), ("lm_eval", False)):
    source = Haystacks(short_keys(), words, lambda t: [t], repeats=repeats)
    ((_, sample),) = samples(
      generator, TASKS["niah_single_2"], 4096, 1, source, count_tokens, 0
    )
    first = " ".join(words[3:10])
    assert (sample.prompt.count(first) > 1) == repeats


def test_a_length_that_nothing_fits_is_refused_in_one_line():
  calls = []

  def count(text):
    calls.append(text)
    return count_tokens(text)

  task = TASKS["niah_single_2"]
  with pytest.raises(
    ValueError, match=r"length=512: niah_single_2 .*500 words"
  ):
    list(samples("ruler", task, 512, 5, haystacks("ruler"), count, 0))
  assert len(calls) < 200
  with pytest.raises(ValueError, match=r"length=150: niah_single_2 does not"):
    list(samples("lm_eval", task, 150, 5, haystacks("lm_eval"), count, 0))
  # lm-eval's generator leaves the haystack out where it does not fit.
  ((_, sample),) = samples(
    "lm_eval", task, 512, 1, haystacks("lm_eval"), count, 0
  )
  assert count_tokens(sample.text) < 100


def test_noise_is_one_line_repeated():
  ((_, sample),) = samples(
    "ruler", TASKS["niah_single_1"], 700, 1, haystacks("ruler"), count_tokens, 0
  )
  lines = sample.text.splitlines()[1:-1]
  assert len(set(lines)) == 2 and lines.count(NOISE) == len(lines) - 1
