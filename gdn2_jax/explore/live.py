"""The explorer in Jupyter, where the model runs at every choice."""

import html
from typing import Any

from gdn2_jax.explore.changes import CHANGES, Change
from gdn2_jax.explore.documents import DEFAULT, held_out
from gdn2_jax.explore.extra import check_installed
from gdn2_jax.explore.model import open_run
from gdn2_jax.explore.runs import Place, make_runner
from gdn2_jax.explore.text import label, read_text
from gdn2_jax.explore.views import Study

MAX_TOKENS = 256
OWN_TEXT, OWN_FACTORS = "own text", "own factors"


def explore(
  run: Any, text: str | None = None, *, max_tokens: int = MAX_TOKENS
) -> Any:
  """Shows the gates and states of a model over a text in a notebook.

  The page of `save_page`, with any text and any factors: the model runs when a
  choice is made. The script of Bokeh goes to the browser with the first call,
  not into the file of the notebook.

  Args:
    run: from `load_run` or `load_model`, or the path of its folder, see
      `open_run`.
    text: text that is read first; None takes a held-out document of the
      package's corpus. Others are chosen or typed in the notebook.
    max_tokens: later tokens of a text are left out.

  Returns:
    A widget, which a notebook shows as the last value of a cell.

  Raises:
    ValueError: too short a text, or a model without gates or tokenizer.
    ModuleNotFoundError: Bokeh, jupyter_bokeh or ipywidgets is not installed.
    OSError: the model is not there.
  """
  check_installed("bokeh", "jupyter_bokeh", "ipywidgets")
  from gdn2_jax.explore.draw.notebook import Widget, load_scripts

  session = Session(run, text, max_tokens=max_tokens)
  load_scripts()
  return Widget(session.layout.root)


class Session:
  """Controls of an explorer, and the model that follows them.

  Args:
    run: as for `explore`, like the others.
    text: text to read first, or None.
    max_tokens: later tokens are left out.

  Attributes:
    layout: layout with its controls.
    controls: those that a page does not have.
  """

  def __init__(self, run: Any, text: str | None, *, max_tokens: int):
    from gdn2_jax.explore.draw.layout import make_layout, on_ready, paragraphs
    from gdn2_jax.explore.draw.notebook import make_controls

    opened = open_run(run)
    self._tokenizer = opened.model.tokenizer
    self._runner = make_runner(opened.model.config, opened.model.params)
    self._max_tokens = max_tokens
    documents = held_out()
    chosen = DEFAULT if text is None else OWN_TEXT
    start = documents[DEFAULT] if text is None else text
    self._study = self._read(start)
    self.controls = make_controls([OWN_TEXT, *documents], chosen, start)
    self.layout = make_layout(
      paragraphs(opened.title, f"Model: {opened.facts}."),
      layers=self._runner.layers,
      heads=range(self._runner.heads),
      changes=[*CHANGES, OWN_FACTORS],
      words={},
      pieces=self._study.text.pieces,
      most=opened.model.config.gdn2.erase_scale,
      extra=self.controls.rows,
    )
    self.draw()
    on_ready(self.layout.document, self.layout.fill)
    for control in (
      self.layout.layer,
      self.layout.head,
      self.layout.change,
    ):
      control.on_change("value", self._on_choice)
    for control in self.controls.factors.values():
      control.on_change("value", self._on_factor)
    self.controls.tie.on_change("active", self._on_factor)
    self.controls.document.on_change("value", self._on_document)
    self.controls.read.on_click(self._on_read)

  def read(self, text: str) -> None:
    """Reads another text, or says in one line why it cannot."""
    try:
      self._study = self._read(text)
    except ValueError as error:
      self._say(str(error))
      return
    self.draw()

  def draw(self) -> None:
    """Runs the model for the choices that are made, and shows its arrays."""
    self._say("The model reads ...")
    layout, study = self.layout, self._study
    place = Place(int(layout.layer.value), int(layout.head.value))
    try:
      wanted = [(place, Change()), (place, self._change())]
      (_, _, base), (_, _, now) = study.views(wanted)
    except ValueError as error:
      self._say(str(error))
      return
    ids = sorted({int(i) for i in now["words"].flat})
    shown = layout.shown
    shown.words = {str(i): label(self._tokenizer, i) for i in ids}
    shown.pieces = list(study.text.pieces)
    shown.base = base
    shown.now = now  # last: its change draws
    text = study.text
    self._say(
      f"The text is cut to {len(text.ids)} of {text.length:,} tokens."
      if text.is_cut
      else ""
    )

  def _read(self, text: str) -> Study:
    read = read_text(self._tokenizer, text, self._max_tokens)
    # Two rows, the model as it is and changed, in one run.
    return Study(self._runner, read, rows=2)

  def _change(self) -> Change:
    name = self.layout.change.value
    if name != OWN_FACTORS:
      return CHANGES[name]
    factors = {
      gate: float("nan" if control.value is None else control.value)
      for gate, control in self.controls.factors.items()
    }
    change = Change(tie=bool(self.controls.tie.active), **factors)
    change.check()
    return change

  # Bokeh asks for these names of arguments.
  def _on_choice(self, attr: str, old: Any, new: Any) -> None:
    self.draw()

  def _on_read(self, event: Any) -> None:
    self.controls.document.value = OWN_TEXT
    self.read(self.controls.text.value)

  def _on_factor(self, attr: str, old: Any, new: Any) -> None:
    if self.layout.change.value == OWN_FACTORS:
      self.draw()
    else:
      self.layout.change.value = OWN_FACTORS  # draws

  def _on_document(self, attr: str, old: Any, new: Any) -> None:
    if new != OWN_TEXT:
      self.controls.text.value = held_out()[new]
      self.read(self.controls.text.value)

  def _say(self, message: str) -> None:
    self.layout.messages.text = html.escape(message)
    self.layout.messages.visible = bool(message)
