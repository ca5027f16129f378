"""Controls for notebooks, and the script of Bokeh without its copies."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from bokeh import __version__
from bokeh.models import Button, Checkbox, Row, Select, Spinner, TextAreaInput
from bokeh.resources import Resources
from jupyter_bokeh import BokehModel

from gdn2_jax.explore.draw.layout import LABELS, WRAP, select

_LOAD = "application/vnd.bokehjs_load.v0+json"  # of jupyter_bokeh
_NAMES = {"decay": "Decay g x", "erase": "Erase b x", "write": "Write w x"}


@dataclasses.dataclass(frozen=True)
class Controls:
  """What a notebook adds: texts, and factors of the gates.

  Attributes:
    document: selection of a text.
    text: text that is typed.
    read: button after which the model reads it.
    factors: factor by field of `Change`.
    tie: the gates are tied before they are scaled.
    rows: rows of the layout.
  """

  document: Select
  text: TextAreaInput
  read: Button
  factors: Mapping[str, Spinner]
  tie: Checkbox
  rows: Sequence[Any]


class Widget(BokehModel):
  """A layout as a widget, which files of notebooks hold as one line."""

  _is_open = True

  def close(self) -> None:
    """Closes the widget; again, as its removal does, has no effect."""
    if self._is_open:
      self._is_open = False
      super().close()

  def __repr__(self) -> str:
    return "Gate explorer: run this cell to see it"


def make_controls(documents: Sequence[str], chosen: str, text: str) -> Controls:
  """The controls, with a chosen document and its text."""
  document = select("Document", documents, "Document to read")
  document.value = chosen
  area = TextAreaInput(
    title="Text (edit it, then press the button)",
    value=text,
    rows=4,
    sizing_mode="stretch_width",
    stylesheets=[LABELS],
  )
  read = Button(
    label="Read the text", width=150, align="end", stylesheets=[LABELS]
  )
  factors = {
    field: Spinner(
      title=name, low=0, step=0.1, value=1.0, width=100, stylesheets=[LABELS]
    )
    for field, name in _NAMES.items()
  }
  tie = Checkbox(
    label="tied first", active=False, align="end", stylesheets=[LABELS]
  )
  wrap = {"sizing_mode": "stretch_width", "stylesheets": [WRAP]}
  rows = [area, Row(document, read, *factors.values(), tie, **wrap)]
  return Controls(document, area, read, factors, tie, rows)


def load_scripts() -> None:
  """Sends the script of Bokeh to the browser of a notebook, if there is one.

  It is inlined, for notebooks without network. Then the output is replaced by
  nothing, so that the file of the notebook does not hold it.
  """
  from IPython import get_ipython
  from IPython.display import display

  if get_ipython() is None:
    return
  resources = Resources(mode="inline", components=["bokeh", "bokeh-widgets"])
  code = "\n".join(resources.js_raw)
  code = (
    f"if (window.Bokeh?.version !== '{__version__}') "
    f"(function() {{\n{code}\n}}).call(window)"
  )
  data = {_LOAD: code, "application/javascript": code}
  handle = display(data, raw=True, display_id=True)
  handle.update({"text/plain": ""}, raw=True)
