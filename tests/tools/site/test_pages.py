"""Pages, links and names of the documentation site; `make docs` builds it."""

import ast
import functools
import importlib
import pathlib
import re
import tomllib

import pytest
import yaml

from tools.site import formulas, outside, tables

ROOT = pathlib.Path(__file__).parents[3]
DOCS = ROOT / "docs"
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
DIRECTIVE = re.compile(r"^::: (\S+)$", re.MULTILINE)
PUBLIC = ("", ".train", ".inference", ".interop", ".nnx")


def names_in(nav) -> list[str]:
  """Pages of a nav, in order."""
  if isinstance(nav, str):
    return [nav]
  parts = nav.values() if isinstance(nav, dict) else nav
  return [name for part in parts for name in names_in(part)]


@functools.cache
def pages() -> dict[str, str]:
  """Texts of all pages by name."""
  own = [str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")]
  return {
    name: (ROOT / outside.source_of(name)).read_text()
    for name in [*own, *outside.PAGES]
  }


def directives() -> list[str]:
  return [name for text in pages().values() for name in DIRECTIVE.findall(text)]


@functools.cache
def defined_in(module: str) -> set[str]:
  """Names that a module defines or imports, without running it."""
  path = ROOT / module.replace(".", "/")
  path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
      names.add(node.name)
    elif isinstance(node, ast.Assign):
      names |= {t.id for t in node.targets if isinstance(t, ast.Name)}
    elif isinstance(node, ast.ImportFrom):
      names |= {alias.asname or alias.name for alias in node.names}
  return names


def test_the_nav_has_every_page_once():
  notebooks = [
    f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")
  ]
  assert sorted(names_in(CONFIG["nav"])) == sorted([*pages(), *notebooks])


def test_formulas_are_prepared_for_the_converter():
  found = formulas.prepare(r"\begin{aligned} a &amp;= b \end{aligned}")
  assert found == r"\begin{align*} a &= b \end{align*}"
  found = formulas.prepare(r"\big(\bigcup x\Bigr)")
  assert found == r"(\bigcup x)"


def test_formulas_are_drawn_outside_code_only():
  page = (
    '<script src="https://cdn/mathjax/latest.js"></script>'
    "<p>$a$ and $$b$$ cost 1$</p><pre>$c$</pre><img src='$d$'>"
  )
  drawn = formulas.draw(page, lambda text: formulas.FORMULA.sub("[M]", text))
  assert drawn == ("<p>[M] and [M] cost 1$</p><pre>$c$</pre><img src='$d$'>")


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names_are_in_the_reference(package):
  module = importlib.import_module(f"gdn2_jax{package}")
  names = {f"{module.__name__}.{name}" for name in module.__all__}
  missing = names - {"gdn2_jax.__version__"} - set(directives())
  assert not missing


def test_names_of_the_reference_exist():
  for name in directives():
    module, _, attribute = name.rpartition(".")
    assert attribute in defined_in(module), name


def test_links_of_pages_lead_somewhere():
  wrong = []
  for page, text in pages().items():
    folder = (ROOT / outside.source_of(page)).parent
    text = outside.CODE.sub("", text)
    wrong += [
      f"{page}: {target}"
      for target, _ in outside.LINK.findall(text)
      if not (folder / target).exists()
    ]
  assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
  "target, page, expected",
  [
    ("weights.md", "data.md", "weights.md"),
    ("../docs/weights.md", "benchmarks.md", "weights.md"),
    ("../benchmarks/README.md", "data.md", "benchmarks.md"),
    ("../scale.md", "api/train.md", "../scale.md"),
    ("../../README.md", "api/train.md", "../overview.md"),
    ("results/a.json", "benchmarks.md", "results/a.json"),
    (
      "results/serve_cpu_epyc.png",
      "benchmarks.md",
      "benchmarks/results/serve_cpu_epyc.png",
    ),
    (
      "../notebooks/01_gate_dynamics.ipynb",
      "notebook.md",
      "notebooks/01_gate_dynamics.ipynb",
    ),
    ("missing.md", "data.md", "missing.md"),
    ("../../elsewhere", "data.md", "../../elsewhere"),
  ],
)
def test_links_are_led(target, page, expected):
  assert outside.lead(target, page) == expected


def test_files_that_are_no_page_are_linked_in_the_repository():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  source = project["urls"]["Source"]
  assert (
    outside.lead("../Makefile", "data.md") == f"{source}/blob/main/Makefile"
  )
  assert CONFIG["extra"]["social"][0]["link"] == source


def test_only_links_are_changed():
  text = "[a](../README.md#x) [b](https://b.c/d.md) [e](#f)\n```\n{}\n```\n"
  code = "[a](../README.md)"
  led = outside.lead_links(text.format(code), "data.md")
  expected = text.replace("../README.md", "overview.md")
  assert led == expected.format(code)


def test_docstrings_link_pages():
  text = "see docs/scale.md, docs/missing.md and x/docs/scale.md"
  link = '<a href="../scale.html">docs/scale.md</a>'
  expected = text.replace("see docs/scale.md", f"see {link}")
  assert outside.link_pages(text, "api/train.md") == expected


def test_tables_show_the_records():
  filled = tables.fill(pages()["performance.md"])
  assert "<!-- table" not in filled
  for row in tables.read("kernels_modelled")["rows"]:
    times = (row["ms_low"], row["ms_mid"], row["ms_high"], row["floor_ms"])
    cells = " | ".join(f"{time:.2f}" for time in times)
    assert f"| {row['name']} | {cells} |" in filled
  for row in tables.read("serve_cpu_epyc")["rows"]:
    if row["section"] == "decode" and row["length"] in tables.LENGTHS:
      line = f"| {row['model']} |"
      shown = [x for x in filled.splitlines() if x.startswith(line)]
      assert any(tables.number(row.get("ms")) in x.split(" ") for x in shown)
  with pytest.raises(KeyError, match="nothing"):
    tables.fill("<!-- table: nothing -->")


def test_modelled_times_are_called_so():
  parts = pages()["performance.md"].split("## Modelled for an H100\n")
  assert len(parts) == 2
  modelled = ("kernels", "passes")
  for name in tables.TABLES:
    where = parts[name in modelled]
    assert f"<!-- table: {name} -->" in where, name
  assert "modelled, not measured" in tables.kernels()


def test_pages_ask_no_other_host():
  assert CONFIG["theme"]["font"] is False
  assert "repo_url" not in CONFIG
  assert "extra_javascript" not in CONFIG
  assert not any("//" in path for path in CONFIG["extra_css"])
