"""The page of the explorer in a browser: controls, keyboard, widths."""

import collections
import io
import re

import numpy as np
import PIL.Image
import pytest
from bokeh.palettes import Blues256, Oranges256

from gdn2_jax.explore import save_page
from gdn2_jax.explore.changes import CHANGES
from gdn2_jax.explore.runs import Place, make_runner
from gdn2_jax.explore.text import read_text
from gdn2_jax.explore.views import Study
from tests.browser import MIN_FONT, WIDTHS, open_page
from tests.explore.pages import TEXT, byte_model

pytestmark = pytest.mark.slow

TOKENS = 20
LABELS = ("Layer", "Head", "Change of this head", "Decay as")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
  path = tmp_path_factory.mktemp("page") / "explorer.html"
  save_page(byte_model(), TEXT, path, max_tokens=TOKENS)
  return path.as_uri()


@pytest.fixture(scope="module", params=WIDTHS)
def opened(request, address):
  with open_page(address, request.param) as opened:
    opened.page.wait_for_function("Bokeh.documents[0]?.is_idle")
    opened.pixels()
    yield opened
    assert opened.errors == []


def choose(opened, label, value):
  opened.page.get_by_label(label, exact=True).select_option(value)


def status(opened):
  return opened.page.get_by_text(re.compile("Token .* of 0 to")).inner_text()


def test_it_asks_for_nothing_and_logs_no_error(opened, address):
  assert opened.requests == [address]
  assert opened.errors == []


def test_it_fits_its_width(opened):
  width = opened.page.viewport_size["width"]
  assert opened.run("return document.documentElement.scrollWidth") <= width
  rights = opened.run(
    "return walk(document).filter(x => x.tagName === 'CANVAS')"
    ".map(x => x.getBoundingClientRect().right)"
  )
  assert len(rights) >= 10 and max(rights) <= width


def test_texts_are_readable(opened):
  assert opened.small_texts() == []
  sizes = opened.run(
    """const found = []
    for (const m of Bokeh.documents[0]._all_models.values())
      for (const [name, p] of Object.entries(m.properties))
        if (name.endsWith("font_size"))
          found.push(parseFloat(p.get_value().value ?? p.get_value()))
    return found"""
  )
  assert len(sizes) > 50 and min(sizes) >= MIN_FONT


def test_pictures_and_controls_have_names(opened):
  names = opened.run(
    "return walk(document).filter(x => x.getAttribute('role') === 'img')"
    ".map(x => x.getAttribute('aria-label'))"
  )
  assert len(names) == 10 and len(set(names)) == 10 and all(names)
  assert opened.run("return document.documentElement.lang") == "en"
  assert opened.page.title() == "Gate explorer"
  for label in LABELS:
    assert opened.page.get_by_label(label, exact=True).count() == 1


@pytest.mark.parametrize("label", LABELS)
def test_every_selection_changes_the_pictures(opened, label):
  control = opened.page.get_by_label(label, exact=True)
  values = control.evaluate("x => [...x.options].map(o => o.value)")
  assert len(values) > 1
  seen = []
  for value in values:
    choose(opened, label, value)
    pixels = opened.pixels()
    assert pixels not in seen, value
    seen.append(pixels)
  choose(opened, label, values[0])
  assert opened.pixels() == seen[0]


def colour_of(opened, label):
  """The most frequent colour of a picture but for its ground, as #rrggbb."""
  picture = opened.page.get_by_label(label)
  image = PIL.Image.open(io.BytesIO(picture.screenshot())).convert("RGB")
  counts = collections.Counter(image.get_flattened_data())
  del counts[255, 255, 255]
  return "#{:02x}{:02x}{:02x}".format(*counts.most_common(1)[0][0])


def test_colours_are_those_of_the_values(opened):
  decay = "Decay: image of key channels by tokens"
  choose(opened, LABELS[2], "no decay: g = 0")
  for unit in ("e^g (kept per token)", "half-life (tokens)"):
    choose(opened, "Decay as", unit)
    opened.pixels()
    assert colour_of(opened, decay) == Blues256[0]
  choose(opened, LABELS[2], "no erase: b = 0")
  opened.pixels()
  erase = "Erase gate b: image of key channels by tokens"
  assert colour_of(opened, erase) == Oranges256[-1]
  choose(opened, LABELS[2], "as is")


def test_the_slider_moves_the_mark_by_arrow_keys(opened):
  before, line = opened.pixels(), status(opened)
  handle = opened.page.get_by_role("slider")
  handle.focus()
  opened.page.keyboard.press("ArrowRight")
  assert opened.pixels() != before
  assert status(opened) != line
  assert f"Token {TOKENS // 2 + 1} of 0 to {TOKENS - 1}" in status(opened)
  opened.page.keyboard.press("ArrowLeft")
  assert opened.pixels() == before and status(opened) == line


def test_a_click_on_a_picture_chooses_a_token(opened):
  line = status(opened)
  picture = opened.page.get_by_label("Decay: image of key channels by tokens")
  picture.scroll_into_view_if_needed()
  box = picture.bounding_box()
  opened.page.mouse.click(
    box["x"] + 0.25 * box["width"], box["y"] + 0.4 * box["height"]
  )
  opened.pixels()
  assert status(opened) != line
  handle = opened.page.get_by_role("slider")
  handle.focus()
  now = int(float(handle.get_attribute("aria-valuenow")))
  for _ in range(TOKENS // 2 - now):
    opened.page.keyboard.press("ArrowRight")
  opened.pixels()
  assert status(opened) == line


def test_tab_reaches_every_control_and_arrows_change_selections(opened):
  # Also through the ten pictures, which take the focus, and once around.
  reached = set()
  for _ in range(30):
    opened.page.keyboard.press("Tab")
    reached.add(opened.focused())
  text = "\n".join(reached)
  for label in LABELS:
    assert any(x.startswith("SELECT") and label in x for x in reached), text
  assert "noUi-handle" in text
  layer = opened.page.get_by_label("Layer", exact=True)
  layer.focus()
  before = opened.pixels()
  opened.page.keyboard.press("ArrowDown")
  assert layer.input_value() == "1" and opened.pixels() != before
  opened.page.keyboard.press("ArrowUp")
  assert opened.pixels() == before


def test_what_is_drawn_is_what_was_computed(opened):
  model = byte_model()
  text = read_text(model.tokenizer, TEXT, TOKENS)
  name = "tied: w = b = their mean"
  study = Study(make_runner(model.config, model.params), text)
  ((_, _, view),) = study.views([(Place(1, 1), CHANGES[name])])
  for label, value in (("Layer", "1"), ("Head", "1"), (LABELS[2], name)):
    choose(opened, label, value)
  opened.pixels()
  drawn = opened.run(
    """for (const m of Bokeh.documents[0]._all_models.values())
      if (m.type === "ColumnDataSource" && "norm_now" in m.data)
        return [Array.from(m.data.norm_now), Array.from(m.data.kl)]"""
  )
  np.testing.assert_allclose(drawn[0], view["norm"], rtol=1e-6)
  np.testing.assert_allclose(drawn[1], view["kl"], rtol=1e-6)
  assert f"= {drawn[1][TOKENS // 2]:#.3g}" in status(opened)
  for label, value in (("Layer", "0"), ("Head", "0"), (LABELS[2], "as is")):
    choose(opened, label, value)
