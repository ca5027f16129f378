"""Type checkers see the types of the public names."""

import pathlib
import re
import subprocess
import sys

import pytest

import gdn2_jax
import gdn2_jax.train

ROOT = pathlib.Path(__file__).parent.parent
SCRIPT = ROOT / "tests" / "typed_user.py"


@pytest.mark.parametrize("package", [gdn2_jax, gdn2_jax.train])
def test_names_are_spelt_the_same_everywhere(package):
  """In __all__, in the table of homes, and in what type checkers import."""
  names = set(package.__all__) - {"__version__"}
  assert names == set(package._HOME)
  text = pathlib.Path(package.__file__).read_text()
  block = text.split("if TYPE_CHECKING:\n")[1].split("\n_HOME")[0]
  assert names <= set(re.findall(r"\w+", block))
  for name in names:
    assert getattr(package, name) is not None
  script = SCRIPT.read_text()
  assert all(f"reveal_type({name})" in script for name in names)


def test_the_wheel_has_the_marker():
  assert (ROOT / "gdn2_jax" / "py.typed").is_file()
  assert '"py.typed"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.slow
def test_a_users_script_has_types(tmp_path):
  done = subprocess.run(
    [
      *(sys.executable, "-m", "mypy"),
      f"--python-executable={sys.executable}",
      f"--cache-dir={tmp_path}",
      "--follow-imports=silent",
      "--check-untyped-defs",
      str(SCRIPT),
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  lines = done.stdout.splitlines()
  assert not [line for line in lines if ": error:" in line], done.stdout
  shown = [line for line in lines if "Revealed type is" in line]
  wanted = SCRIPT.read_text().count("\nreveal_type(")
  assert len(shown) == wanted, done.stdout
  # Parameters of a model are Any, a tree of arrays; a whole name is not.
  opaque = [line for line in shown if re.search(r'is "Any"', line)]
  assert not opaque, opaque
