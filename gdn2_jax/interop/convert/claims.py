"""Checks of a config.json against the tensors beside it.

A size must be told by one of them, and where both tell it they must agree. A
key that nobody here knows is refused: it may change what the model computes.
"""

import dataclasses
import difflib
import math
from collections.abc import Collection, Mapping
from typing import Any

from gdn2_jax.interop.convert.tensors import Tensors
from gdn2_jax.interop.names import GDN2, Dialect

_OF_GDN2 = {theirs for _, theirs, _ in GDN2}


@dataclasses.dataclass(frozen=True)
class Shown:
  """What the shapes of the tensors show; None where they do not.

  Attributes:
    kinds: of the layers in order, "G" recurrent or "S" softmax attention.
    kda: whether the recurrent layers are Kimi Delta Attention.
    vocab_size, model_dim, mlp_dim: sizes.
    heads: key heads H; of KDA, those of q and k.
    decays: heads that have a decay of their own.
    value_heads, key_dim, value_dim, conv_width: HV, K, V and W.
    rows: rows of the attention weights by name.
  """

  kinds: str
  kda: bool
  vocab_size: int | None
  model_dim: int | None
  mlp_dim: int | None
  heads: int | None
  decays: int | None
  value_heads: int | None
  key_dim: int | None
  value_dim: int | None
  conv_width: int | None
  rows: dict[str, int]


def look_at(dialect: Dialect, tensors: Tensors) -> Shown:
  """Reads sizes off the shapes; takes what it finds and refuses nothing."""
  attention = {theirs for _, theirs, _ in dialect.attention}
  only_gdn2 = {dialect.mixer + name for name in _OF_GDN2 - attention}
  layers = dialect.layer_names(tensors)
  kinds, first = "", {}
  for n in range(max(layers, default=-1) + 1):
    kind = "G" if layers.get(n, set()) & only_gdn2 else "S"
    kinds += kind
    first.setdefault(kind, n)

  def shape(name: str) -> tuple[int, ...]:
    return tuple(tensors[name].shape) if name in tensors else ()

  def mixer(kind: str, name: str) -> tuple[int, ...]:
    """Shape in the first layer of a kind."""
    if kind not in first:
      return ()
    return shape(dialect.layer.format(first[kind]) + dialect.mixer + name)

  def rows(kind: str, name: str) -> int | None:
    found = mixer(kind, name)
    return found[0] if found else None

  theirs = {ours: name for ours, name, _ in (*dialect.model, *dialect.block)}
  table = shape(theirs["embedding.table"])
  vocab_size, model_dim = table if len(table) == 2 else (None, None)
  gate = shape(dialect.layer.format(0) + theirs["mlp.gate.kernel"])
  decays, keys = rows("G", "A_log"), rows("G", "q_proj.weight")
  key_dim = _quotient(rows("G", "dt_bias"), decays)
  value_dim = rows("G", "o_norm.weight")
  return Shown(
    kinds=kinds,
    kda=decays is not None
    and not mixer("G", "w_proj.weight")
    and rows("G", "b_proj.weight") == decays,
    vocab_size=vocab_size,
    model_dim=model_dim,
    mlp_dim=gate[0] if gate else None,
    heads=_quotient(keys, key_dim),
    decays=decays,
    value_heads=_quotient(rows("G", "v_proj.weight"), value_dim),
    key_dim=key_dim,
    value_dim=value_dim,
    conv_width=_quotient(math.prod(mixer("G", "q_conv1d.weight")), keys),
    rows={name: rows("S", name) for name in attention if mixer("S", name)},
  )


def _quotient(a: int | None, b: int | None) -> int | None:
  return a // b if a and b and a % b == 0 else None


class Claims:
  """Typed reading of a config.json; every key is to be asked for."""

  def __init__(self, values: Mapping[str, Any], path: Any):
    self._values = dict(values)
    self._path = path
    self._asked: set[str] = set()

  def pass_over(self, *names: str) -> None:
    """Accepts keys with any value: nothing in this model reads them."""
    self._asked.update(names)

  def has(self, name: str) -> bool:
    """Whether there is such a key with a value."""
    return self._values.get(name) is not None

  def stated(self, name: str) -> bool:
    """Whether there is such a key, be it null."""
    return name in self._values

  def raw(self, name: str, default: Any = None) -> Any:
    """A value as it is; null is the default."""
    self._asked.add(name)
    value = self._values.get(name)
    return default if value is None else value

  def number(self, name: str, default: float | None = None) -> float:
    """A finite positive number.

    Raises:
      ValueError: it is something else, or missing without a default.
    """
    value = self.raw(name, default)
    if value is None:
      self._missing(name)
    if type(value) not in (int, float) or not 0 < value < 1e300:
      self.refuse(name, "a positive number")
    return float(value)

  def boolean(self, name: str, default: bool) -> bool:
    """True or false."""
    value = self.raw(name, default)
    if type(value) is not bool:
      self.refuse(name, "true or false")
    return value

  def size(
    self, *names: str, shown: int | None = None, default: int | None = None
  ) -> int:
    """A positive integer under the first of the names that is there.

    Args:
      *names: names of the key.
      shown: what the tensors say.
      default: where neither is known.

    Raises:
      ValueError: it is something else, disagrees with the tensors, or nobody
        tells it.
    """
    self._asked.update(names)
    given = [name for name in names if self.has(name)]
    for name in given:
      value = self._values[name]
      if type(value) is not int or not 0 < value < 2**31:
        self.refuse(name, "a positive integer")
      if shown is not None and value != shown:
        raise ValueError(
          f"{self._path}: {name}={value}, but the tensors have {shown}"
        )
    if given:
      return self._values[given[0]]
    if shown is None and default is None:
      self._missing(names[0])
    return default if shown is None else shown

  def only(self, name: str, *allowed: Any) -> None:
    """Refuses a key that has another value than the one this model has.

    Raises:
      ValueError: naming the key, its value and what is supported.
    """
    self._asked.add(name)
    if name in self._values:
      value = self._values[name]
      # 1 == True, but a flag is not a number; 1 and 1.0 are the same number.
      if not any(
        value == a and isinstance(value, bool) is isinstance(a, bool)
        for a in allowed
      ):
        self.refuse(name, " or ".join(map(repr, allowed)) + ", nothing else")

  def refuse(self, name: str, expected: str) -> None:
    """Raises ValueError for the value of a key."""
    raise ValueError(
      f"{self._path}: {name}={self._values[name]!r}: expected {expected}"
    )

  def finish(self, harmless: Collection[str], ignored: Collection[str]) -> None:
    """Refuses keys that nobody asked for.

    Args:
      harmless: keys that do not change what the model computes.
      ignored: keys that the user says do not.

    Raises:
      ValueError: naming them.
    """
    known = {*self._asked, *harmless}
    left = set(self._values) - known - set(ignored)
    left = sorted(name for name in left if not name.startswith("_"))
    if left:
      told = []
      for name in left:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        told.append(name + "".join(f" (did you mean {k}?)" for k in close))
      raise ValueError(
        f"{self._path}: unknown keys {', '.join(told)}: they may change what "
        "the model computes; if they do not, pass --ignore_config="
        + ",".join(left)
      )

  def _missing(self, name: str) -> None:
    raise ValueError(
      f"{self._path}: {name} is missing, and no tensor tells it; pass "
      f"--set={name}=VALUE"
    )


def shortest_pattern(kinds: str) -> str:
  """The shortest string whose repetition is `kinds`."""
  for length in range(1, len(kinds) + 1):
    if kinds == kinds[:length] * (len(kinds) // length):
      return kinds[:length]
  return kinds


def check_expansion(
  claims: Claims, name: str, key_dim: int, shown: int | None
) -> int:
  """Value channels by their ratio to the key channels.

  Raises:
    ValueError: no whole number, or not what the tensors have.
  """
  value_dim = min(claims.number(name) * key_dim, 2.0**31)
  if abs(value_dim - round(value_dim)) > 1e-5 * value_dim:
    claims.refuse(name, f"a whole number of channels, times {key_dim}")
  value_dim = round(value_dim)
  if shown is not None and value_dim != shown:
    claims.refuse(name, f"{shown} / {key_dim}, by the tensors")
  return value_dim
