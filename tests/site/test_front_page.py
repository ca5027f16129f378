"""The front page of the documentation site in a browser."""

import functools
import http.server
import os
import pathlib
import subprocess
import threading
import urllib.parse

import pytest

from tests.browser import WIDTHS, open_page

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
MKDOCS = ROOT / ".venv-docs" / "bin" / "mkdocs"


class Quiet(http.server.SimpleHTTPRequestHandler):
  def log_message(self, *args):
    pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
  """The folder of the site, built where `make docs` has not."""
  if (ROOT / "site" / "index.html").exists():
    return ROOT / "site"
  if not MKDOCS.exists():
    pytest.fail("neither site/ nor .venv-docs is here: make docs")
  folder = tmp_path_factory.mktemp("docs") / "site"
  done = subprocess.run(
    [MKDOCS, "build", "--strict", "--site-dir", folder],
    cwd=ROOT,
    env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return folder


@pytest.fixture(scope="module")
def address(site):
  """Address of the site on this machine: search needs a server."""
  handler = functools.partial(Quiet, directory=str(site))
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  yield f"http://127.0.0.1:{server.server_port}"
  server.shutdown()
  server.server_close()
  thread.join()


@pytest.fixture(scope="module", params=WIDTHS)
def opened(request, address):
  with open_page(f"{address}/index.html", request.param) as opened:
    opened.page.wait_for_load_state("networkidle")
    yield opened
    assert opened.errors == []


def test_it_logs_no_error_and_asks_this_host_alone(opened, address):
  assert opened.errors == []
  others = [x for x in opened.requests if not x.startswith(address)]
  assert not others


def test_it_fits_its_width(opened):
  width = opened.page.viewport_size["width"]
  assert opened.run("return document.documentElement.scrollWidth") <= width
  assert opened.small_texts() == []


def test_links_lead_to_pages(opened, address, site):
  links = opened.run(
    "return [...document.querySelectorAll('a[href]')].map(a => a.href)"
  )
  own = {link for link in links if link.startswith(address)}
  assert len(own) > 20
  wrong = []
  for link in own:
    parts = urllib.parse.urlsplit(link)
    path = site / urllib.parse.unquote(parts.path).lstrip("/")
    path = path / "index.html" if path.is_dir() else path
    mark = f'id="{parts.fragment}"' if parts.fragment else ""
    if not path.is_file() or mark not in path.read_text():
      wrong.append(link)
  assert not wrong


def test_the_keyboard_reaches_content_and_search(opened):
  page = opened.page
  page.reload()
  page.wait_for_load_state("networkidle")
  page.keyboard.press("Tab")
  assert "md-skip" in opened.focused()
  page.keyboard.press("Enter")
  assert page.url.split("#")[-1] not in ("", page.url)
  page.wait_for_timeout(1000)  # a jump within the page closes the search
  page.keyboard.press("/")
  search = page.get_by_role("textbox", name="Search")
  search.wait_for()
  page.keyboard.type("half-life")
  # Its address has the words that were found.
  page.locator(".md-search-result__link[href*='half']").first.wait_for()
  page.keyboard.press("Escape")


def test_the_explorer_is_embedded(opened, address):
  opened.page.goto(f"{address}/explorer.html")
  frame = opened.page.frame_locator("iframe.explorer")
  opened.page.locator("iframe.explorer").scroll_into_view_if_needed()
  frame.get_by_label("Layer", exact=True).wait_for()
  frame.get_by_text("Token 30 of 0 to 59").wait_for()
  width = opened.page.viewport_size["width"]
  assert opened.run("return document.documentElement.scrollWidth") <= width
