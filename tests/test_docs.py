"""The code on the pages for users runs as it stands."""

import pathlib
import re

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

ROOT = pathlib.Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [
  "README.md",
  "docs/index.md",
  "docs/inference.md",
  "docs/layer.md",
  "docs/research.md",
  "docs/weights.md",
]
# The blocks of research.md train models of many kinds.
MARKS = {"README.md": (), "docs/research.md": pytest.mark.deep}


def blocks_of(page: str) -> list[str]:
  """The Python blocks, each with the line numbers that it has in the page."""
  text = (ROOT / page).read_text()
  return [
    "\n" * text[: match.start(1)].count("\n") + match.group(1)
    for match in BLOCK.finditer(text)
  ]


@pytest.fixture
def programs(tmp_path_factory):
  """Runs of a page share programs: each is compiled once."""
  names = {
    "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
    "jax_persistent_cache_min_compile_time_secs": 0.05,
  }
  old = {name: getattr(jax.config, name) for name in names}
  for name, value in names.items():
    jax.config.update(name, value)
  yield
  for name, value in old.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize(
  "page",
  [
    pytest.param(page, marks=MARKS.get(page, pytest.mark.slow))
    for page in PAGES
  ],
)
def test_the_blocks_of_a_page_run_top_to_bottom(page, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  blocks = blocks_of(page)
  assert blocks
  names = {"__name__": "page"}
  for block in blocks:
    exec(compile(block, str(ROOT / page), "exec"), names)
