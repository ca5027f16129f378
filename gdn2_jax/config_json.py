"""Dataclass trees to JSON and back, with strict names and types.

Types come from the annotations of the fields; the error about an unknown field
or a value of another type names its path.
"""

import dataclasses
import json
import types
import typing
from typing import Any, Literal

from gdn2_jax.config_class import unknown_field


def to_json(config: Any) -> str:
  """A dataclass as indented JSON, every field spelled out."""
  return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(cls: type, text: str) -> Any:
  """The inverse of `to_json`; fields left out take their defaults.

  Raises:
    ValueError: not JSON, an unknown field, or a value of another type.
  """
  try:
    tree = json.loads(text)
  except (ValueError, RecursionError) as e:
    raise ValueError(f"config: not valid JSON: {e}") from e
  return from_dict(cls, tree, "config")


def from_dict(cls: type, tree: Any, path: str) -> Any:
  """An instance of `cls` from nested dicts; `path` is for messages.

  Raises:
    ValueError: an unknown field, or a value of another type.
  """
  if not isinstance(tree, dict):
    raise ValueError(f"{path}={tree!r}: expected an object of {cls.__name__}")
  hints = typing.get_type_hints(cls)
  names = {field.name for field in dataclasses.fields(cls)}
  unknown = sorted(set(tree) - names)
  if unknown:
    raise ValueError(unknown_field(cls, unknown[0], path))
  values = {}
  for name, value in tree.items():
    hint, where = hints[name], f"{path}.{name}"
    if dataclasses.is_dataclass(hint):
      values[name] = from_dict(hint, value, where)
    else:
      values[name] = _coerce(value, hint, where)
  return cls(**values)


def check_types(config: Any, path: str) -> None:
  """Raises ValueError for a value that is not of its field's type.

  Config files are Python: nothing else refuses a string in place of 3.
  """
  hints = typing.get_type_hints(type(config))
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    where = f"{path}.{field.name}"
    if dataclasses.is_dataclass(hints[field.name]):
      if not isinstance(value, hints[field.name]):
        raise ValueError(f"{where}: expected a {hints[field.name].__name__}")
      check_types(value, where)
    else:
      _coerce(value, hints[field.name], where)


def _coerce(value: Any, hint: Any, where: str) -> Any:
  """`value` as the type `hint`; converts only int to float, list to tuple."""
  origin = typing.get_origin(hint)
  if origin is Literal:
    allowed = typing.get_args(hint)
    if value not in allowed:
      raise ValueError(f"{where}={value!r}: expected one of {allowed}")
    return value
  if origin in (typing.Union, types.UnionType):
    options = typing.get_args(hint)
    if value is None and type(None) in options:
      return None
    (hint,) = (option for option in options if option is not type(None))
    return _coerce(value, hint, where)
  if origin is tuple and isinstance(value, (list, tuple)):
    element = typing.get_args(hint)[0]
    return tuple(
      _coerce(v, element, f"{where}[{i}]") for i, v in enumerate(value)
    )
  if hint is float and type(value) is int:
    return float(value)
  expected = hint if origin is None else origin
  # bool is an int to isinstance, but a flag is not a number.
  if type(value) is not expected:
    raise ValueError(
      f"{where}={value!r}: expected {expected.__name__}, "
      f"got {type(value).__name__}"
    )
  return value
