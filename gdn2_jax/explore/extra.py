"""Check of the optional packages of the explorer."""

import importlib.util


def check_installed(*packages: str) -> None:
  """Raises ModuleNotFoundError in one line if a package is missing."""
  for name in packages:
    if importlib.util.find_spec(name) is None:
      raise ModuleNotFoundError(
        f"the explorer needs {name}: pip install 'gdn2-jax[explorer]'"
      )
