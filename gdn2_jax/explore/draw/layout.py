"""Layout of the explorer: controls, panels, and the scripts that draw."""

import dataclasses
import html
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from bokeh.core.properties import Any as AnyValue
from bokeh.core.properties import Dict, List, String
from bokeh.document import Document
from bokeh.events import DocumentReady, Tap
from bokeh.model import DataModel
from bokeh.models import Column, CustomJS, Div, Row, Select, Slider

from gdn2_jax.explore.draw.figures import Panel, Panels

HALF_LIFE, RATE = "half-life (tokens)", "e^g (kept per token)"
_HERE = pathlib.Path(__file__).parent
_INK = {"color": "#1f2328", "font-size": "15px", "line-height": "1.45"}
# Indices do not push lines apart.
_WORDS = "sub, sup { line-height: 0; } p { margin: 4px 0; }"
LABELS = ":host, :host * { font-size: 15px; }"
# Grid items are as wide as the screen allows, three in a row at 1280 pixels.
_GRID = """
:host {
  display: grid !important;
  grid-template-columns: repeat(auto-fit, minmax(min(330px, 100%), 1fr));
  gap: 8px 20px;
}
"""
WRAP = ":host { flex-wrap: wrap; gap: 4px 16px; }"
# The token stays in sight while the panels scroll, where there is room.
_STICKY = """
:host { background: #ffffff; }
@media (min-width: 900px) and (min-height: 600px) {
  :host { position: sticky; top: 0; z-index: 5; }
}
"""
_TEXT = """
:host { min-height: 3em; }
.bk-clearfix { font-family: monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
mark { background: #ffd33d; outline: 1px solid #1f2328; }
"""


class Shown(DataModel):
  """What the figures show; a change of `now` draws it.

  Attributes:
    now: arrays of the chosen head and change, see `Study.views`.
    base: the same without change.
    words: text by token id.
    pieces: text of each token.
  """

  now = Dict(String, AnyValue)
  base = Dict(String, AnyValue)
  words = Dict(String, String)
  pieces = List(String)


@dataclasses.dataclass(frozen=True)
class Layout:
  """Parts of an explorer that a page or a session connects.

  Attributes:
    document: holds the root.
    root: the whole layout.
    shown: see `Shown`.
    layer, head, change: selections.
    token: slider over the tokens.
    unit: selection of the unit of the decay.
    messages: text under the controls, for errors and what was cut.
    fill: script that draws `shown`.
  """

  document: Document
  root: Any
  shown: Shown
  layer: Select
  head: Select
  change: Select
  token: Slider
  unit: Select
  messages: Div
  fill: CustomJS


def script(name: str, **arguments: Any) -> CustomJS:
  """A script of this folder with its arguments."""
  return CustomJS(code=(_HERE / f"{name}.js").read_text(), args=arguments)


def select(title: str, options: Sequence[str], label: str) -> Select:
  """A list of options, the first chosen; as wide as its longest option."""
  longest = max(map(len, (title, *options)))
  return Select(
    title=title,
    value=options[0],
    options=list(options),
    width=max(90, 40 + 8 * longest),
    stylesheets=[LABELS],
    html_attributes={"aria-label": label},
  )


def text_box(text: str, **options: Any) -> Div:
  """A paragraph over the width of the page."""
  sheets = [_WORDS, *options.pop("stylesheets", [])]
  return Div(
    text=text,
    sizing_mode="stretch_width",
    styles=_INK,
    stylesheets=sheets,
    **options,
  )


def make_layout(
  intro: str,
  *,
  layers: Sequence[int],
  heads: Sequence[int],
  changes: Sequence[str],
  words: Mapping[int, str],
  pieces: Sequence[str],
  most: float,
  extra: Sequence[Any] = (),
) -> Layout:
  """Builds the explorer; nothing is drawn before `shown.now` is set.

  Args:
    intro: HTML above the controls.
    layers: layers to choose from.
    heads: heads to choose from.
    changes: names of the changes to choose from.
    words: text by token id.
    pieces: text of each token.
    most: upper end of the colours of erase and write.
    extra: rows of further controls, above the others.
  """
  shown = Shown(words={str(i): w for i, w in words.items()}, pieces=[*pieces])
  panels = Panels(shown, most)
  layer = select("Layer", [str(x) for x in layers], "Layer of the model")
  head = select("Head", [str(x) for x in heads], "Value head of the layer")
  change = select("Change of this head", changes, "Change of the gates")
  unit = select("Decay as", [HALF_LIFE, RATE], "Unit of the decay")
  token = Slider(
    title="Token (arrow keys)",
    start=0,
    end=len(pieces) - 1,
    value=len(pieces) // 2,
    step=1,
    min_width=200,
    sizing_mode="stretch_width",
    stylesheets=[LABELS],
    html_attributes={"aria-label": "Chosen token"},
  )
  messages = text_box("", html_attributes={"role": "alert"}, visible=False)
  around = text_box("", stylesheets=[_TEXT])
  status = text_box("", html_attributes={"aria-live": "polite"})
  mark = script(
    "mark",
    shown=shown,
    parts=panels.parts,
    spans=panels.spans,
    slider=token,
    around=around,
    status=status,
  )
  fill = script(
    "fill", shown=shown, parts=panels.parts, slider=token, unit=unit, mark=mark
  )
  shown.js_on_change("now", fill)
  unit.js_on_change("value", fill)
  token.js_on_change("value", mark)
  for panel in panels.panels:
    if panel.figure.x_range is panels.parts["time_range"]:
      code = (
        "slider.value = Math.max(0, Math.min(slider.end, Math.round(cb_obj.x)))"
      )
      panel.figure.js_on_event(Tap, CustomJS(args={"slider": token}, code=code))
  selections = Row(
    layer, head, change, unit, sizing_mode="stretch_width", stylesheets=[WRAP]
  )
  sticky = Column(
    token, status, sizing_mode="stretch_width", stylesheets=[_STICKY]
  )
  grid = Column(
    *map(_panel, panels.panels),
    sizing_mode="stretch_width",
    stylesheets=[_GRID],
  )
  root = Column(
    text_box(intro),
    *extra,
    selections,
    messages,
    around,
    sticky,
    grid,
    sizing_mode="stretch_width",
    styles={"max-width": "1500px", "margin": "0 auto", "background": "#ffffff"},
  )
  document = Document()
  document.add_root(root)
  return Layout(
    document, root, shown, layer, head, change, token, unit, messages, fill
  )


def on_ready(document: Document, callback: CustomJS) -> None:
  """Runs a script once the document is drawn."""
  document.js_on_event(DocumentReady, callback)


def paragraphs(title: str, *texts: str) -> str:
  """HTML of a heading and paragraphs of plain text."""
  body = "".join(f"<p>{html.escape(text)}</p>" for text in texts if text)
  style = "font-size: 26px; margin: 8px 0 4px; line-height: 1.2"
  return f'<h1 style="{style}">{html.escape(title)}</h1>{body}'


def _panel(panel: Panel) -> Column:
  style = "font-size: 17px; margin: 10px 0 2px"
  words = text_box(
    f'<h2 style="{style}">{panel.title}</h2><p style="margin: 0">'
    f"{panel.text}</p>"
  )
  wide = {"grid-column": "1 / -1"} if panel.is_wide else {}
  return Column(words, panel.figure, sizing_mode="stretch_width", styles=wide)
