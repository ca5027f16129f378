"""Arrays that are drawn, pages of the explorer, and what it refuses."""

import dataclasses
import importlib.util
import re

import numpy as np
import pytest

from gdn2_jax.explore import save_page
from gdn2_jax.explore.changes import CHANGES, Change
from gdn2_jax.explore.model import open_run
from gdn2_jax.explore.runs import Place, make_runner
from gdn2_jax.explore.text import read_text
from gdn2_jax.explore.views import Study
from tests.explore.pages import TEXT, byte_model
from tests.explore.recurrence import changed, outputs

# Of the rounding to 9 significant bits.
ROUNDING = 2.0**-9


@pytest.fixture(scope="module")
def study():
  model = byte_model()
  text = read_text(model.tokenizer, TEXT, 96)
  return Study(make_runner(model.config, model.params), text)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
  path = tmp_path_factory.mktemp("page") / "explorer.html"
  line = save_page(byte_model(), TEXT, path, max_tokens=12, note="A <note>.")
  return path, line


def test_views_are_those_of_the_recurrence(study):
  place, change = Place(1, 0), CHANGES["double erase: 2 b"]
  _, (_, _, view) = study.views([(place, Change()), (place, change)])
  # As many rows and tokens as the study has: one program for all.
  _, heads = study.runner.run(
    np.pad(study.text.ids, (0, 32 - len(study.text.ids))),
    [place] * 8,
    [Change()] * 8,
  )
  head = heads[0].first(len(study.text.ids))
  gates = changed(head.g, head.b, [head.w], 0, change)
  _, states = outputs(head.q, head.k, head.v, *gates)
  norm = np.linalg.norm(states, axis=(1, 2))
  np.testing.assert_allclose(view["norm"], norm, rtol=2 * ROUNDING)
  rows = view["key_channels"]
  np.testing.assert_allclose(view["erase"], gates[1].T[rows], rtol=2 * ROUNDING)
  spans = np.log(2) / -gates[0].mean(0)[rows]
  np.testing.assert_allclose(view["span"], spans, rtol=2 * ROUNDING)
  assert np.all(np.diff(view["span"]) >= 0)


def test_next_tokens_are_the_likeliest_of_both(study):
  place = Place(0, 1)
  wanted = [(place, Change()), (place, Change(write=0.0))]
  (_, _, before), (_, _, after) = study.views(wanted)
  assert not before["kl"].any() and (after["kl"] > 0).all()
  np.testing.assert_array_equal(before["before"], before["after"])
  padded = np.pad(study.text.ids, (0, 32 - len(study.text.ids)))
  logits, _ = study.runner.run(padded, [place] * 8, 4 * [c for _, c in wanted])
  p = np.exp(logits.astype(np.float64))
  p /= p.sum(-1, keepdims=True)
  for t in (0, 7):
    most = np.maximum(p[0, t], p[1, t])
    assert set(after["words"][t]) == set(np.argsort(-most)[:10])
    for name, run in (("before", 0), ("after", 1)):
      want = p[run, t, after["words"][t]]
      np.testing.assert_allclose(after[name][t], want, rtol=2 * ROUNDING)
    kl = np.sum(p[0, t] * np.log(p[0, t] / p[1, t]))
    np.testing.assert_allclose(after["kl"][t], kl, rtol=1e-2)


def test_a_page_is_one_file_with_everything(page):
  path, line = page
  text = path.read_text()
  assert "12 tokens, layers 0, 1, heads 0, 1, 11 changes" in line
  assert "The text is cut to 12 of 26 tokens." in line
  assert "Gate explorer" in text and "A &amp;lt;note&amp;gt;." in text
  for name in CHANGES:
    assert name in text
  # Of tags alone: scripts name addresses that they never ask for.
  assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)=.?http", text)
  # With Bokeh's script for formulas it would have 1.8 MB more.
  assert path.stat().st_size < 2_500_000


@pytest.mark.parametrize(
  ("text", "options", "says"),
  [
    ("", {}, "text='': 0 tokens, expected at least 2"),
    ("a", {}, "text='a': 1 tokens, expected at least 2"),
    (TEXT, {"max_tokens": 1}, "max_tokens=1: expected at least 2"),
    (TEXT, {"layers": [2]}, "layer=2: expected one of 0, 1"),
    (TEXT, {"heads": [0, 2]}, "head=2: expected 0 to 1"),
    (TEXT, {"heads": []}, r"heads=\[\]: expected at least one"),
    (TEXT, {"layers": [0, 0]}, r"layers=\[0, 0\]: expected at least one, none"),
  ],
)
def test_what_cannot_be_shown_is_refused(text, options, says, tmp_path):
  with pytest.raises(ValueError, match=says):
    save_page(byte_model(), text, tmp_path / "a.html", **options)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("most", [1000, 1_900_000])
def test_a_page_that_is_too_large_is_refused(most, tmp_path):
  # The first by its arrays, the second by the whole file.
  with pytest.raises(ValueError, match=r"at most .* MB: take fewer tokens"):
    save_page(byte_model(), TEXT, tmp_path / "a.html", max_bytes=most)
  assert not list(tmp_path.iterdir())


def test_models_without_gates_or_text_are_refused(tmp_path):
  path = tmp_path / "a.html"
  with pytest.raises(ValueError, match="pattern='S': expected at least one"):
    save_page(byte_model("S"), TEXT, path)
  silent = dataclasses.replace(byte_model(), tokenizer=None)
  with pytest.raises(ValueError, match="run: a model without a tokenizer"):
    save_page(silent, TEXT, path)
  with pytest.raises(ValueError, match="run=dict: expected a model"):
    open_run({})


def test_a_missing_package_is_named_in_one_line(monkeypatch, tmp_path):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  says = r"^the explorer needs bokeh: pip install 'gdn2-jax\[explorer\]'$"
  with pytest.raises(ModuleNotFoundError, match=says):
    save_page(byte_model(), TEXT, tmp_path / "a.html")
