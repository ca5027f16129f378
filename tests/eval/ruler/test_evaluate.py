"""Scores of samples against a full forward pass, and their means."""

import dataclasses

import pytest

from gdn2_jax.eval.rows import RowStore
from gdn2_jax.eval.ruler.evaluate import Plan, evaluate, score_samples
from gdn2_jax.eval.ruler.report import format_tables, summarize
from gdn2_jax.eval.ruler.tasks import Haystacks, Sample, other_value
from gdn2_jax.eval.ruler.words import short_keys
from gdn2_jax.eval.scoring import greedy
from tests.eval.plain import expected, make_model

SAMPLE = Sample(
  text="Hm. One of the special magic numbers for k-m is: 123. k-m?",
  answer_prefix="It is",
  key="k-m",
  value="123",
  depth=0.5,
  kind="number",
)
PLAN = Plan(
  generator="lm_eval",
  tasks=("niah_single_1", "niah_single_2"),
  lengths=(700, 800),
  samples=3,
  seed=1,
  scores=("generated", "forced", "gain"),
  batch_size=2,
)


def test_forced_and_gain_are_those_of_full_forward_passes():
  model = make_model("G")
  encode = model.tokenizer.encode
  (row,) = score_samples(model, [SAMPLE], ("forced", "gain"), 4)
  right = expected("G", encode(SAMPLE.prompt), encode(" 123"))
  other = SAMPLE.with_value(other_value(SAMPLE))
  assert other.prompt != SAMPLE.prompt
  wrong = expected("G", encode(other.prompt), encode(" 123"))
  # The error of a sum of 4 tokens, of which each has less than 1e-6.
  assert row["value_logprob"] == pytest.approx(right.logprob, abs=2e-5)
  assert row["gain"] == pytest.approx(right.logprob - wrong.logprob, abs=4e-5)
  assert abs(row["gain"]) > 1e-3
  assert row["forced"] is right.is_greedy is False
  assert row["value_tokens"] == 4
  assert row["prompt_tokens"] == len(SAMPLE.prompt)


def test_generated_is_whether_the_answer_contains_the_value():
  model = make_model("S")
  prompt = model.tokenizer.encode(SAMPLE.prompt)
  (text,) = greedy(model, [prompt], 128, batch_size=2)
  found = dataclasses.replace(SAMPLE, value=text[5:9].swapcase())
  rows = score_samples(model, [found, SAMPLE], ("generated",), 2)
  assert [row["generated"] for row in rows] == [True, "123" in text]
  assert [row["text"] for row in rows] == [text, text]


def stub(monkeypatch, calls):
  """Scores without a model: every sample with an even index is right."""

  def score_all(model, batch, scores, batch_size):
    calls.append(len(batch))
    return [
      {
        "prompt_tokens": 600,
        "generated": True,
        "forced": False,
        "gain": sample.depth,
      }
      for sample in batch
    ]

  monkeypatch.setattr("gdn2_jax.eval.ruler.evaluate.score_samples", score_all)


def make_haystacks() -> Haystacks:
  return Haystacks(short_keys(), ["Word."] * 900, str.split, repeats=False)


def test_finished_rows_are_not_computed_again(tmp_path, monkeypatch):
  calls, seen = [], []
  stub(monkeypatch, calls)

  def run(plan):
    with RowStore(tmp_path, {}) as store:
      evaluate(
        make_model("S"),
        make_haystacks(),
        plan,
        store,
        facts={"seed": 1},
        on_rows=lambda *row: seen.append(row),
      )
      return list(store.rows())

  rows = run(PLAN)
  assert calls == [2, 1] * 4 and len(rows) == 12
  assert seen[:2] == [("niah_single_1", 700, 2), ("niah_single_1", 700, 1)]
  assert rows[0]["fill"] == 1.04 and rows[0]["seed"] == 1
  assert run(PLAN) == rows and len(calls) == 8
  more = run(dataclasses.replace(PLAN, samples=4))
  assert more[:12] == rows and calls[8:] == [1] * 4
  (tmp_path / "rows.jsonl").write_text("")
  whole = run(dataclasses.replace(PLAN, samples=4))
  by_key = lambda row: row["key"]  # noqa: E731
  assert sorted(whole, key=by_key) == sorted(more, key=by_key)


def test_a_length_that_does_not_fit_costs_no_computation(monkeypatch):
  calls = []
  stub(monkeypatch, calls)
  plan = dataclasses.replace(PLAN, lengths=(700, 200))
  with RowStore(None, {}) as store:
    with pytest.raises(ValueError, match="length=200"):
      evaluate(make_model("S"), make_haystacks(), plan, store, facts={})
  assert not calls


def test_means_are_those_of_the_plan_alone():
  plan = dataclasses.replace(PLAN, lengths=(700,), samples=4)
  scores = [(True, 1.0), (True, 2.0), (False, 6.0)]
  rows = [
    {
      "key": f"niah_single_1/700/{i}",
      "generated": hit,
      "forced": False,
      "gain": gain,
      "fill": 0.9,
    }
    for i, (hit, gain) in enumerate(scores)
  ]
  other = {"key": "niah_single_1/700/9", "generated": True, "gain": 99.0}
  first, second = summarize([*rows, other], plan)
  assert first["samples"] == 3 and second["samples"] == 0
  assert first["generated"]["mean"] == pytest.approx(2 / 3)
  assert first["gain"]["mean"] == pytest.approx(3)
  # t(0.975, 2) = 4.302653, standard deviation 7 ** 0.5
  assert first["gain"]["high"] - 3 == pytest.approx(4.302653 * (7 / 3) ** 0.5)
  # Wilson's interval of 2 of 3.
  p, n, z = 2 / 3, 3, 1.959964
  half = z * (p * (1 - p) / n + (z / (2 * n)) ** 2) ** 0.5
  low = (p + z**2 / (2 * n) - half) / (1 + z**2 / n)
  assert first["generated"]["low"] == pytest.approx(low, abs=1e-6)
  assert second["gain"] is None
  text = format_tables([first, second], plan)
  assert "S-NIAH-1  66.7 [20.8, 93.9]" in text
  assert "S-NIAH-2                  -" in text
