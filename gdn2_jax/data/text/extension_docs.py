"""Prints the docstrings of the standard library's C modules as JSON.

Run as a script in an isolated interpreter (`python -I -S extension_docs.py`):
importing every extension module has side effects, and what the caller has
already imported or patched must not change the text. It therefore imports
nothing of this package.
"""

import importlib
import importlib.machinery
import importlib.util
import inspect
import json
import sys
import warnings


def is_compiled(name: str) -> bool:
  """True if a top-level standard-library module is written in C."""
  if name.startswith(("_test", "_xx", "xx")) or name.endswith("_test"):
    return False
  try:
    spec = importlib.util.find_spec(name)
  except (ImportError, ValueError):  # __main__ has no spec
    return False
  if spec is None:
    return False
  suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
  return spec.origin == "built-in" or str(spec.origin).endswith(suffixes)


def documented(owner: object) -> list[tuple[str, str]]:
  """(name, docstring) of the callables and types in a namespace, sorted."""
  found = []
  for name, value in sorted(vars(owner).items()):
    described = (
      inspect.isroutine(value)
      or inspect.isclass(value)
      or inspect.isdatadescriptor(value)
    )
    if described and isinstance(value.__doc__, str):
      found.append((name, inspect.cleandoc(value.__doc__)))
  return found


def module_docs(name: str) -> list[tuple[str, str]]:
  """(qualified name, docstring) of everything in a module, in name order."""
  try:
    module = importlib.import_module(name)
  except ImportError:  # built against a library this machine lacks
    return []
  found = []
  if isinstance(module.__doc__, str):
    found.append((name, inspect.cleandoc(module.__doc__)))
  for member, text in documented(module):
    found.append((f"{name}.{member}", text))
    value = vars(module)[member]
    if inspect.isclass(value):
      found += [
        (f"{name}.{member}.{attribute}", doc)
        for attribute, doc in documented(value)
      ]
  return found


def main() -> None:
  """Writes {module: [[qualified name, docstring], ...]} to standard output."""
  warnings.simplefilter("ignore")  # deprecated modules still have docstrings
  names = sorted(filter(is_compiled, sys.stdlib_module_names))
  docs = {name: module_docs(name) for name in names}
  json.dump(docs, sys.stdout)


if __name__ == "__main__":
  main()
