"""Chromium for tests of pages: what a page asks for, logs and draws."""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import sync_playwright

WIDTHS = (1280, 400)
MIN_FONT = 11  # pixels
_NAMES = ("chromium", "chromium-browser", "google-chrome")

# All elements, those in shadow roots as well.
_WALK = """
  const walk = (root, found = []) => {
    for (const x of root.querySelectorAll("*")) {
      found.push(x)
      if (x.shadowRoot) walk(x.shadowRoot, found)
    }
    return found
  }
"""


@dataclasses.dataclass
class Opened:
  """A page in a browser, and what happened on it.

  Attributes:
    page: page of playwright.
    errors: errors on the console and exceptions.
    requests: addresses that were asked for, but for data: ones.
  """

  page: Any
  errors: list[str] = dataclasses.field(default_factory=list)
  requests: list[str] = dataclasses.field(default_factory=list)

  def run(self, code: str) -> Any:
    """The value of an expression or block; `walk(root)` lists all elements."""
    return self.page.evaluate(f"() => {{ {_WALK} {code} }}")

  def pixels(self) -> list[str]:
    """Contents of all canvases, once they have stopped changing."""
    code = """return walk(document).filter(x => x.tagName === "CANVAS")
      .map(x => x.toDataURL())"""
    self.page.wait_for_timeout(150)
    now = self.run(code)
    for _ in range(50):
      before = now
      self.page.wait_for_timeout(100)
      now = self.run(code)
      if now == before:
        return now
    raise AssertionError("the page did not stop drawing within 5 s")

  def small_texts(self) -> list[str]:
    """Visible texts in a font below MIN_FONT."""
    code = """return walk(document).filter(x => x.checkVisibility() &&
      [...x.childNodes].some(n => n.nodeType === 3 && n.data.trim()) &&
      !["STYLE", "SCRIPT"].includes(x.tagName) &&
      parseFloat(getComputedStyle(x).fontSize) < LEAST)
      .map(x => x.outerHTML.slice(0, 200))"""
    return self.run(code.replace("LEAST", str(MIN_FONT)))

  def focused(self) -> str:
    """Tag, class and label of the element with the focus."""
    return self.run(
      """let x = document.activeElement
      while (x && x.shadowRoot && x.shadowRoot.activeElement)
        x = x.shadowRoot.activeElement
      const label = x.labels?.[0]?.textContent ?? ""
      return [x.tagName, x.className, label].join(" ").trim()"""
    )


def find_browser() -> str:
  """Path of Chromium or Chrome; skips the test without one."""
  for name in _NAMES:
    if path := shutil.which(name):
      return path
  pytest.skip(f"none of {', '.join(_NAMES)}: tools/install_chromium.sh")


@contextlib.contextmanager
def open_page(address: str, width: int) -> Iterator[Opened]:
  """A page in a window of a width, closed at the end."""
  with sync_playwright() as playwright:
    browser = playwright.chromium.launch(
      executable_path=find_browser(), args=["--no-sandbox"]
    )
    page = browser.new_page(viewport={"width": width, "height": 900})
    opened = Opened(page)
    page.on(
      "console",
      lambda m: opened.errors.append(m.text) if m.type == "error" else None,
    )
    page.on("pageerror", lambda e: opened.errors.append(str(e)))
    page.on(
      "request",
      lambda r: (
        None if r.url.startswith("data:") else opened.requests.append(r.url)
      ),
    )
    page.goto(address)
    yield opened
    browser.close()
