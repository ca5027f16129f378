"""README.md as the text of the package index, its links made absolute."""

import pathlib
import re
import tomllib

from setuptools import setup

HERE = pathlib.Path(__file__).parent
PROJECT = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]


def index_readme() -> str:
  """README.md, whose relative links would lead nowhere on an index."""
  base, version = PROJECT["urls"]["Source"], PROJECT["version"]

  def absolute(link: re.Match) -> str:
    # A page about a picture is no picture.
    view = "raw" if link[1].endswith((".png", ".svg")) else "blob"
    return f"]({base}/{view}/v{version}/{link[1]})"

  relative = r"\]\((?!https?://|#)([^)]+)\)"
  return re.sub(relative, absolute, (HERE / "README.md").read_text())


setup(
  long_description=index_readme(),
  long_description_content_type="text/markdown",
)
