"""README.md as the text of the package index, its links made absolute."""

import pathlib
import re
import tomllib

from setuptools import setup

HERE = pathlib.Path(__file__).parent
PROJECT = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]


def index_readme() -> str:
  """README.md, whose relative links would lead nowhere on an index."""
  source = f"{PROJECT['urls']['Source']}/blob/v{PROJECT['version']}"
  relative = r"\]\((?!https?://|#)([^)]+)\)"
  return re.sub(relative, rf"]({source}/\1)", (HERE / "README.md").read_text())


setup(
  long_description=index_readme(),
  long_description_content_type="text/markdown",
)
