"""The explorer of a notebook: choices run the model, errors are one line."""

import importlib.util

import numpy as np
import pytest

from gdn2_jax.explore import explore
from gdn2_jax.explore.changes import CHANGES, Change
from gdn2_jax.explore.live import OWN_FACTORS, OWN_TEXT, Session
from gdn2_jax.explore.runs import Place, make_runner
from gdn2_jax.explore.text import read_text
from gdn2_jax.explore.views import Study
from tests.explore.pages import TEXT, byte_model

MODEL = byte_model()


def view_of(place, change, text=TEXT):
  read = read_text(MODEL.tokenizer, text, 256)
  runner = make_runner(MODEL.config, MODEL.params)
  ((_, _, view),) = Study(runner, read, rows=2).views([(place, change)])
  return view


def assert_shown(session, place, change, text=TEXT):
  want = view_of(place, change, text)
  assert set(session.layout.shown.now) == set(want)
  for name, array in want.items():
    np.testing.assert_array_equal(session.layout.shown.now[name], array)


@pytest.fixture
def session():
  return Session(MODEL, TEXT, max_tokens=256)


def test_choices_run_the_model(session):
  layout = session.layout
  assert session.controls.document.value == OWN_TEXT
  assert_shown(session, Place(0, 0), Change())
  layout.layer.value, layout.head.value = "1", "1"
  assert_shown(session, Place(1, 1), Change())
  name = "no write: w = 0"
  layout.change.value = name
  assert_shown(session, Place(1, 1), CHANGES[name])
  assert session.layout.messages.text == ""
  assert layout.shown.now["kl"].max() > layout.shown.base["kl"].max() == 0
  ids = {int(i) for i in layout.shown.now["words"].flat}
  assert ids == {int(i) for i in layout.shown.words}


def test_any_factors_and_any_text(session):
  session.controls.factors["erase"].value = 1.3
  assert session.layout.change.value == OWN_FACTORS
  assert_shown(session, Place(0, 0), Change(erase=1.3))
  session.controls.factors["decay"].value = 0
  session.controls.tie.active = True
  change = Change(tie=True, erase=1.3, decay=0.0)
  assert_shown(session, Place(0, 0), change)
  other = "Something else."
  session.controls.text.value = other
  session._on_read(None)
  assert_shown(session, Place(0, 0), change, other)
  assert "".join(session.layout.shown.pieces) == other


def test_errors_are_shown_in_one_line_and_nothing_is_lost(session):
  before = session.layout.shown.now
  session.read("")
  messages = session.layout.messages
  assert messages.visible
  assert messages.text == "text=&#x27;&#x27;: 0 tokens, expected at least 2"
  session.controls.factors["write"].value = None
  assert "write=nan: expected a finite factor" in messages.text
  np.testing.assert_array_equal(session.layout.shown.now["kl"], before["kl"])


def test_documents_are_held_out_ones_and_cut():
  session = Session(MODEL, None, max_tokens=20)
  session.controls.document.value = "topics/unary"
  assert "".join(session.layout.shown.pieces) == "Unary arithmetic and"
  assert session.controls.text.value.startswith("Unary arithmetic and bitw")
  assert session.layout.messages.text == (
    "The text is cut to 20 of 844 tokens."
  )


def test_a_widget_holds_the_layout():
  widget = explore(MODEL, TEXT)
  assert "Gate explorer" in str(widget.render_bundle["docs_json"])
  assert repr(widget) == "Gate explorer: run this cell to see it"
  widget.close()
  widget.close()


def test_missing_packages_are_named_in_one_line(monkeypatch):
  real = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util,
    "find_spec",
    lambda name: None if name == "jupyter_bokeh" else real(name),
  )
  says = r"^the explorer needs jupyter_bokeh: pip install 'gdn2-jax\[explorer"
  with pytest.raises(ModuleNotFoundError, match=says):
    explore(MODEL, TEXT)
