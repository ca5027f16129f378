"""Hook of MkDocs: formulas of notebooks as MathML, which browsers draw.

mkdocs-jupyter would load MathJax from another host; the site loads nothing.
"""

import html as entities
import re
from typing import Any

# Code, pictures and scripts hold no formulas.
OPAQUE = re.compile(
  r"<(pre|code|script|style|svg)\b.*?</\1>|<img\b[^>]*>", re.DOTALL
)
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+?)\$", re.DOTALL)
SCRIPT = re.compile(r"<script\b[^>]*mathjax.*?</script>", re.DOTALL)


def prepare(formula: str) -> str:
  """LaTeX of a formula from its HTML, in the words that the converter knows."""
  latex = entities.unescape(formula).replace("{aligned}", "{align*}")
  # It draws the two parentheses of \big( \big) in different sizes.
  return re.sub(r"\\[bB]ig[glr]*(?![a-z])", "", latex)


def to_mathml(text: str) -> str:
  """Replaces every formula in a piece of HTML without code."""
  from latex2mathml.converter import convert  # tests run without it

  def replace(match: re.Match[str]) -> str:
    display = "block" if match[1] else "inline"
    return convert(prepare(match[1] or match[2]), display=display)

  return FORMULA.sub(replace, text)


def draw(html: str, to_math: Any = to_mathml) -> str:
  """Replaces the formulas of a page, and removes MathJax's loader."""
  html = SCRIPT.sub("", html)
  pieces, end = [], 0
  for block in OPAQUE.finditer(html):
    pieces += [to_math(html[end : block.start()]), block[0]]
    end = block.end()
  return "".join([*pieces, to_math(html[end:])])


def on_page_content(html: str, *, page: Any, **_: Any) -> str:
  """Draws the formulas of a notebook's page."""
  return draw(html) if page.file.src_uri.endswith(".ipynb") else html
