"""Answers to lm-eval's requests, without lm-eval."""

import dataclasses
import functools
import math

import numpy as np
import pytest

from gdn2_jax.data.tokenizer.api import BytesTokenizer, train_bpe
from gdn2_jax.eval.harness import answers
from gdn2_jax.eval.harness.adapter import Requests
from gdn2_jax.eval.harness.answers import encode_pairs
from gdn2_jax.eval.harness.rows import format_rows, make_row
from gdn2_jax.eval.scoring import score
from tests.eval.plain import expected, make_model
from tests.eval.test_scoring import TOLERANCE

TOKENIZER = BytesTokenizer()


@dataclasses.dataclass
class Instance:
  """What lm-eval's Instance has that a model reads."""

  args: tuple


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
  """Texts are read 16 tokens at a time, so that short ones have borders."""
  pieces = functools.partial(score, chunk_size=16)
  monkeypatch.setattr(answers, "score", pieces)


def ask(method, *arguments):
  requests = Requests(make_model("G"), batch_size=4)
  return getattr(requests, method)([Instance(args) for args in arguments])


def test_continuations_are_scored_after_their_contexts():
  pairs = [
    ("one two", " three"),
    ("one two", " four"),
    ("", "start"),
    ("spaces ", "move"),
    ("nothing", ""),
  ]
  found = ask("loglikelihood", *pairs)
  moved = [*pairs[:3], ("spaces", " move")]
  for (nats, is_greedy), (context, continuation) in zip(
    found[:4], moved, strict=True
  ):
    want = expected(
      "G", TOKENIZER.encode(context), TOKENIZER.encode(continuation)
    )
    assert abs(nats - want.logprob) < len(continuation) * TOLERANCE
    assert is_greedy == want.is_greedy
  assert found[4] == (0.0, True)


def test_documents_are_read_with_the_state_carried_through():
  text = "a document of more than two pieces, 16 tokens each"
  found = ask("loglikelihood_rolling", (text,), ("",), ("short",))
  tokens = TOKENIZER.encode(text)
  want = expected("G", [], tokens).logprob
  assert abs(found[0] - want) < len(tokens) * TOLERANCE
  assert found[1] == 0.0
  # Without the state it would be this, far beyond rounding.
  windows = [tokens[i : i + 16] for i in range(0, len(tokens), 16)]
  alone = sum(expected("G", [], window).logprob for window in windows)
  assert abs(alone - want) > 100 * len(tokens) * TOLERANCE


def test_texts_are_continued_up_to_their_stops(monkeypatch):
  calls = []

  def fake(model, prompts, count, *, stop_strings, batch_size, on_done):
    calls.append((len(prompts), count, stop_strings))
    on_done(len(prompts))
    return [model.tokenizer.decode(prompt) + "!" for prompt in prompts]

  monkeypatch.setattr(answers, "greedy", fake)
  found = ask(
    "generate_until",
    ("a", {"until": ["\n", ""], "max_gen_toks": 5}),
    ("b", {"until": "\n", "max_new_tokens": 5, "do_sample": False}),
    ("c", {"temperature": 0.0}),
    ("d", {"until": ["\n"], "max_gen_toks": 5}),
  )
  assert found == ["a!", "b!", "c!", "d!"]
  assert calls == [(3, 5, ("\n",)), (1, 256, ())]


@pytest.mark.parametrize(
  "options, message",
  [
    ({"do_sample": True}, "do_sample=True, temperature=0.0: expected greedy"),
    ({"temperature": 0.7}, "temperature=0.7: expected greedy"),
    ({"max_gen_toks": 0}, "max_gen_toks=0: expected >= 1"),
  ],
)
def test_samples_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    ask("generate_until", ("a", options))


def test_a_continuation_is_encoded_as_inside_the_text():
  tokenizer = train_bpe(["the cat sat on the mat"] * 20, 300)
  pairs = [("the cat", " sat"), ("the cat ", "sat"), ("", "the"), ("  ", "x")]
  contexts, continuations = encode_pairs(tokenizer, pairs)
  whole = tokenizer.encode("the cat sat")
  assert contexts[0] + continuations[0] == contexts[1] + continuations[1]
  assert contexts[0] + continuations[0] == whole
  assert contexts[0] == tokenizer.encode("the cat")
  assert contexts[2] == contexts[3] == []
  assert continuations[3] == tokenizer.encode("  x")
  # "ma" + "t": one token, which is the context's last.
  assert len(tokenizer.encode(" mat")) == 1
  contexts, continuations = encode_pairs(tokenizer, [("on the ma", "t")])
  assert continuations == [tokenizer.encode(" mat")]
  assert contexts == [tokenizer.encode("on the")]


def test_rows_have_values_errors_versions_and_hashes():
  samples = [
    {"doc_hash": "a", "prompt_hash": "b", "target_hash": "c", "acc": 1.0}
  ]
  row = make_row(
    {
      "results": {
        "piqa": {
          "alias": "piqa",
          "acc,none": np.float64(0.625),
          "acc_stderr,none": 0.125,
          "ppl,none": math.inf,
          "ppl_stderr,none": "N/A",
        }
      },
      "groups": {"all": {"alias": "all", "acc,none": 0.5}},
      "n-samples": {"piqa": {"original": 20, "effective": 10}},
      "n-shot": {"piqa": 0},
      "versions": {"piqa": 1.0},
      "samples": {"piqa": samples},
    }
  )
  first, second, group = row["results"]
  assert first == {
    "task": "piqa",
    "metric": "acc",
    "filter": "none",
    "value": 0.625,
    "stderr": 0.125,
    "n": 10,
    "shots": 0,
    "version": 1.0,
    # SHA-256 of "abc", a published test vector.
    "hash": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
  }
  assert second["value"] is None and second["stderr"] is None
  assert group["task"] == "all" and group["value"] == 0.5
  lines = format_rows([row]).splitlines()
  assert lines[1].split() == ["piqa", "acc", "none", "0.625000", "0.1250", "10"]
  assert "not finite" in lines[2]
