"""Weights under the names of other programs: there, back and across.

`python -m gdn2_jax.convert --help` says what it takes. The public names below
are loaded on first use, so that --help never pays for importing JAX.
"""

import importlib

_HOME = {
  "Options": "gdn2_jax.convert.options",
  "Report": "gdn2_jax.convert.report",
  "convert": "gdn2_jax.convert.run",
}

__all__ = ["Options", "Report", "convert"]


def __getattr__(name: str):
  if name not in _HOME:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
  return sorted(__all__)
