"""Config dataclasses: strict about names, with choices and texts of fields."""

import dataclasses
import difflib
import functools
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal


class UnknownFieldError(AttributeError, ValueError):
  """An assignment to, or a keyword for, a field that a config lacks."""


# eq_default: with generated equality, type checkers would take the class for
# unhashable; they know no default for unsafe_hash.
@typing.dataclass_transform(
  eq_default=False,
  kw_only_default=True,
  field_specifiers=(dataclasses.field,),
)
def config_class[T](cls: type[T]) -> type[T]:
  """Decorator: a keyword-only, hashable dataclass with no other attributes.

  Python would keep a misspelt field as a new attribute, and the run would use
  the default of the intended field. Here the assignment and the constructor
  raise UnknownFieldError with the nearest name.
  """
  cls = dataclasses.dataclass(kw_only=True, unsafe_hash=True)(cls)
  init = cls.__init__

  @functools.wraps(init)
  def __init__(self, *args: Any, **values: Any) -> None:
    for name in values:
      _require_field(type(self), name)
    init(self, *args, **values)

  def __setattr__(self, name: str, value: Any) -> None:
    _require_field(type(self), name)
    object.__setattr__(self, name, value)

  cls.__init__ = __init__
  cls.__setattr__ = __setattr__
  return cls


def one_of(name: str, known: Sequence[str]) -> str:
  """Text "one of a, b" for an unknown name, with the one spelt most alike."""
  near = difflib.get_close_matches(name, known, n=1)
  hint = f"; did you mean {near[0]!r}?" if near else ""
  return f"one of {', '.join(known) or 'none'}{hint}"


def unknown_field(cls: type, name: str, path: str = "") -> str:
  """Message about a field that dataclass `cls` lacks, with the nearest ones.

  `path` is that of the instance, such as "config.model", if known.
  """
  near = _nearest(cls, name)
  if near:
    prefix = f"{path}." if path else ""
    names = " or ".join(prefix + field for field in near)
    hint = f"did you mean {names}?"
  else:
    names = ", ".join(field.name for field in dataclasses.fields(cls))
    hint = f"{cls.__name__} has {names}"
  return f"{path or cls.__name__}.{name}: unknown field; {hint}"


def check_choices(config: Any, path: str) -> None:
  """Refuses a value that is not among those of its field's Literal type.

  Raises:
    ValueError: names the field under `path`, its value and the choices.
  """
  for name, allowed in choices(type(config)).items():
    if (value := getattr(config, name)) not in allowed:
      raise ValueError(f"{path}.{name}={value!r}: expected one of {allowed}")


def choices(cls: type) -> dict[str, tuple[Any, ...]]:
  """Allowed values of the fields of dataclass `cls` with a Literal type."""
  return {
    name: typing.get_args(hint)
    for name, hint in typing.get_type_hints(cls).items()
    if typing.get_origin(hint) is Literal
  }


def field_texts(cls: type) -> dict[str, str]:
  """The texts under `Attributes:` in the docstring of dataclass `cls`."""
  # Imported here: only --help needs it.
  import docstring_parser

  found = docstring_parser.parse(
    cls.__doc__ or "", docstring_parser.DocstringStyle.GOOGLE
  )
  return {
    param.arg_name: " ".join((param.description or "").split())
    for param in found.params
  }


def _require_field(cls: type, name: str) -> None:
  if name not in cls.__dataclass_fields__:
    raise UnknownFieldError(unknown_field(cls, name))


def _nearest(cls: type, name: str) -> list[str]:
  """Paths below `cls` of the field spelt most like `name`; may be empty."""

  def likeness(path: str) -> float:
    field = path.rpartition(".")[2]
    ratio = difflib.SequenceMatcher(None, field, name.lower()).ratio()
    # A field of `cls` itself is more likely than one of a group.
    return ratio - 0.1 * path.count(".")

  scores = {path: likeness(path) for path in _paths(cls)}
  best = max(scores.values())
  return [path for path in scores if scores[path] == best >= 0.6]


def _paths(cls: type, prefix: str = "") -> Iterator[str]:
  """Dotted paths of all fields of a tree of dataclasses."""
  hints = typing.get_type_hints(cls)
  for field in dataclasses.fields(cls):
    yield prefix + field.name
    if dataclasses.is_dataclass(hints[field.name]):
      yield from _paths(hints[field.name], f"{prefix}{field.name}.")
