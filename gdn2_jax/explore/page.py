"""Self-contained page of the explorer, for a browser without network."""

import gzip
import hashlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import tqdm

from gdn2_jax import files
from gdn2_jax.explore.changes import AS_IS, CHANGES
from gdn2_jax.explore.extra import check_installed
from gdn2_jax.explore.model import open_run
from gdn2_jax.explore.runs import Place, make_runner
from gdn2_jax.explore.text import label, read_text
from gdn2_jax.explore.views import Study, View

MAX_TOKENS = 96
MAX_BYTES = 5_000_000
_HOW_TO = (
  "Choose a layer and a head. The slider, or a click on a plot, chooses a "
  "token. A change ties, scales or switches off the gates of this head alone; "
  "the model, with all layers after it, has then read the text again. Grey is "
  "the model as it is, blue the changed one."
)


def save_page(
  run: Any,
  text: str,
  path: str | os.PathLike,
  *,
  max_tokens: int = MAX_TOKENS,
  layers: Sequence[int] | None = None,
  heads: Sequence[int] | None = None,
  max_bytes: int = MAX_BYTES,
  note: str = "",
) -> str:
  """Writes one HTML file with everything in it, scripts included.

  It holds every change of `CHANGES` for every layer and head, computed by the
  model, and works in any browser from a disk.

  Args:
    run: from `load_run` or `load_model`, or the path of its folder, see
      `open_run`.
    text: text that the model reads.
    path: file to write.
    max_tokens: later tokens are left out, and the page says so.
    layers: layers of the page; None is all with gates.
    heads: value heads of the page; None is all.
    max_bytes: a larger page is refused.
    note: sentence about the model, for the top of the page.

  Returns:
    One line about the page.

  Raises:
    ValueError: too short a text, a model without gates or tokenizer, a layer or
      head that there is not, or a page that would be too large.
    ModuleNotFoundError: Bokeh is not installed.
    OSError: the model is not there, or the file cannot be written.
  """
  check_installed("bokeh")
  opened = open_run(run)
  tokenizer, config = opened.model.tokenizer, opened.model.config
  tokens = read_text(tokenizer, text, max_tokens)
  runner = make_runner(config, opened.model.params)
  layers = list(runner.layers if layers is None else layers)
  heads = list(range(runner.heads) if heads is None else heads)
  for name, chosen in (("layers", layers), ("heads", heads)):
    if not chosen or len(set(chosen)) < len(chosen):
      raise ValueError(f"{name}={chosen}: expected at least one, none twice")
  places = [Place(layer, head) for layer in layers for head in heads]
  for place in places:
    runner.check(place)
  store = _Store(len(places) * len(CHANGES), max_bytes)
  names = {change: name for name, change in CHANGES.items()}
  wanted = [(place, change) for place in places for change in CHANGES.values()]
  with tqdm.tqdm(total=len(wanted), unit="run", delay=5, disable=None) as bar:
    for place, change, view in Study(runner, tokens).views(wanted):
      store.add(f"{place.layer}/{place.head}/{names[change]}", view)
      bar.update()
  ids = sorted(
    {
      int(i)
      for view in store.views.values()
      for i in store.pool[view["words"]].flat
    }
  )
  cut = ""
  if tokens.is_cut:
    cut = f"The text is cut to {len(tokens.ids)} of {tokens.length:,} tokens."
  from gdn2_jax.explore.draw import html_page  # needs Bokeh

  page = html_page.render(
    opened.title,
    (note, f"Model: {opened.facts}.", _HOW_TO, cut),
    layers=layers,
    heads=heads,
    changes=list(CHANGES),
    words={i: label(tokenizer, i) for i in ids},
    pieces=tokens.pieces,
    most=config.gdn2.erase_scale,
    views=store.views,
    pool=store.pool,
    as_is=AS_IS,
  )
  data = page.encode()
  if len(data) > max_bytes:
    raise ValueError(too_large(len(data), max_bytes))
  files.write_atomically(path, data)
  line = (
    f"{os.fspath(path)}: {len(data) / 1e6:.1f} MB, {len(tokens.ids)} tokens, "
    f"layers {_list(layers)}, heads {_list(heads)}, {len(CHANGES)} changes"
  )
  return f"{line}; {cut}" if cut else line


def too_large(size: int, max_bytes: int) -> str:
  """Message about a page that is too large, and what makes it smaller."""
  return (
    f"the page would have {size / 1e6:.1f} MB, expected at most "
    f"{max_bytes / 1e6:.1f} MB: take fewer tokens (max_tokens), layers or heads"
  )


class _Store:
  """Arrays of all views, equal ones stored once.

  Attributes:
    pool: different arrays.
    views: place in the pool by name of the view and of the array.
  """

  def __init__(self, total: int, max_bytes: int):
    self.pool: list[np.ndarray] = []
    self.views: dict[str, dict[str, int]] = {}
    self._places: dict[str, int] = {}
    self._total, self._max_bytes = total, max_bytes
    self._bytes = 0.0

  def add(self, name: str, view: View) -> None:
    """Adds a view; ValueError as soon as the page is sure to be too large."""
    self.views[name] = {key: self._put(x) for key, x in view.items()}
    # Views of one head share arrays, so that the first ones are larger.
    if len(self.views) % len(CHANGES) == 0:
      size = self._bytes * self._total / len(self.views)
      if size > self._max_bytes:
        raise ValueError(too_large(int(size), self._max_bytes))

  def _put(self, x: np.ndarray) -> int:
    data = np.ascontiguousarray(x).tobytes()
    key = f"{x.dtype}{x.shape}{hashlib.sha256(data).hexdigest()}"
    if key not in self._places:
      self._places[key] = len(self.pool)
      self.pool.append(x)
      # As in the page: compressed, in base64.
      self._bytes += len(gzip.compress(data, 2)) * 4 / 3
    return self._places[key]


def _list(numbers: Sequence[int]) -> str:
  return ", ".join(map(str, numbers))
