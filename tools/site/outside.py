"""Hook of MkDocs: pages, pictures and links outside docs/.

Pages in `PAGES` are files of the repository that the site shows under a name of
its own. Links of all pages are those that work in a clone; here they are led to
the site's page, or to the repository at `Source` of pyproject.toml where a file
is no page. A link to a file that does not exist is reported by MkDocs, whose
strict mode then fails.
"""

import pathlib
import posixpath
import re
import tomllib
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
PAGES = {
  "benchmarks.md": "benchmarks/README.md",
  "changelog.md": "CHANGELOG.md",
  "contributing.md": "CONTRIBUTING.md",
  "kernel_model.md": "tools/kernel_model/README.md",
  "kernels.md": "gdn2_jax/pallas/README.md",
  "overview.md": "README.md",
  "replication_claims.md": "benchmarks/results/replicate_cpu/claims.md",
  "replication_table.md": "benchmarks/results/replicate_cpu/table.md",
}
SITE_NAMES = {source: name for name, source in PAGES.items()}
PICTURES = {".png", ".svg"}
# Blocks of code hold no links; inline ones begin with ]( and no scheme.
CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")


def source_of(name: str) -> str:
  """Path of a page in the repository."""
  return PAGES.get(name, f"docs/{name}")


def repository() -> str:
  """Address of the files of the main branch."""
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  return f"{project['urls']['Source']}/blob/main"


def lead(target: str, page: str) -> str:
  """Address of a relative link in the site.

  Args:
    target: path as it is written in the source of the page.
    page: name of the page in the site.

  Returns:
    A path relative to the page, an address in the repository, or `target`
    itself where neither exists.
  """
  home = posixpath.dirname(source_of(page))
  path = posixpath.normpath(posixpath.join(home, target))
  if not (ROOT / path).exists() or path.startswith(".."):
    return target
  if path in SITE_NAMES:
    name = SITE_NAMES[path]
  elif path.startswith("docs/"):
    name = path.removeprefix("docs/")
  elif pathlib.PurePath(path).suffix == ".ipynb":
    name = path  # mounted by mkdocs-jupyter
  elif pathlib.PurePath(path).suffix in PICTURES:
    name = path
  else:
    return f"{repository()}/{path}"
  return posixpath.relpath(name, posixpath.dirname(page) or ".")


def lead_links(markdown: str, page: str) -> str:
  """Replaces the relative links of a page outside its blocks of code."""

  def replace(match: re.Match[str]) -> str:
    return f"]({lead(match[1], page)}{match[2] or ''})"

  pieces, end = [], 0
  for block in CODE.finditer(markdown):
    pieces += [LINK.sub(replace, markdown[end : block.start()]), block[0]]
    end = block.end()
  return "".join([*pieces, LINK.sub(replace, markdown[end:])])


def on_files(files: Any, *, config: Any) -> Any:
  """Adds the pages, and the pictures that pages show."""
  from mkdocs.structure.files import File  # tests run without MkDocs

  for name, source in PAGES.items():
    path = str(ROOT / source)
    files.append(File.generated(config, name, abs_src_path=path))
  pictures = set()
  for file in files.documentation_pages():
    text = lead_links(file.content_string, file.src_uri)
    for match in LINK.finditer(text):
      home = posixpath.dirname(file.src_uri)
      pictures.add(posixpath.normpath(posixpath.join(home, match[1])))
  for name in sorted(pictures):
    is_picture = pathlib.PurePath(name).suffix in PICTURES
    if is_picture and name not in files.src_uris and (ROOT / name).exists():
      files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
  return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
  """Leads the links of a page."""
  return lead_links(markdown, page.file.src_uri)


def on_page_content(html: str, *, page: Any, **_: Any) -> str:
  """Makes links of the pages that docstrings name, as in docs/scale.md."""
  name = page.file.src_uri
  return link_pages(html, name) if name.startswith("api/") else html


def link_pages(html: str, page: str) -> str:
  """Links docs/NAME.md in the text of a page, where there is such a page."""

  def link(match: re.Match[str]) -> str:
    if not (ROOT / match[0]).exists():
      return match[0]
    address = posixpath.relpath(f"{match[1]}.html", posixpath.dirname(page))
    return f'<a href="{address}">{match[0]}</a>'

  return re.sub(r"(?<![\w/])docs/(\w+)\.md", link, html)
