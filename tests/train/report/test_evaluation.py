"""Rows of a model card from the evaluation of a run."""

import json

import pytest

from gdn2_jax.eval.loss.report import make_report
from gdn2_jax.train.report.evaluation import card_facts


def report(name, nats):
  return make_report(
    name, nats=nats * 2000, tokens=2000, seq_len=64, bytes_per_token=2.5
  ).to_json()


def write(folder, **changes):
  tree = {
    "step": 7,
    "model": {"1x": report("model 1x", 2.5)},
    "baselines": {"bigram": report("bigram", 4.0)},
  }
  (folder / "eval.json").write_text(json.dumps(tree | changes))


def test_losses_of_the_published_step(tmp_path):
  assert card_facts(tmp_path, 7) == {}
  write(tmp_path)
  assert card_facts(tmp_path, 6) == {}
  assert card_facts(tmp_path, 7) == {
    "held-out loss 1x": "2.5000 nats per token, 1.4427 bits per byte "
    "(2,000 tokens in rows of 64)",
    "for comparison: bigram": "4.0000 nats per token, 2.3083 bits per byte",
  }


def test_a_diverged_model(tmp_path):
  write(tmp_path, model={"1x": report("model 1x", float("nan"))})
  assert "not finite" in card_facts(tmp_path, 7)["held-out loss 1x"]


@pytest.mark.parametrize("model", [None, {"1x": {}}, {"1x": 3}])
def test_other_files_are_refused(tmp_path, model):
  write(tmp_path, model=model)
  with pytest.raises(ValueError, match=r"eval\.json: expected the evaluation"):
    card_facts(tmp_path, 7)
