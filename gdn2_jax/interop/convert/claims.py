"""Checks of a config.json against the tensors beside it.

A size must be given by one of them, and where both give it they must agree.
"""

import dataclasses
import difflib
import math
from collections.abc import Collection, Mapping
from typing import Any

from gdn2_jax.interop.convert.tensors import Tensors
from gdn2_jax.interop.names import (
  GDN2,
  GDN2_ROWS,
  WINDOW,
  Dialect,
  recurrent_letters,
)
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.mixers.gdn2 import GDN2Config

_OF_GDN2 = {theirs for _, theirs, _ in GDN2_ROWS}


@dataclasses.dataclass(frozen=True)
class Shown:
  """Sizes by the shapes of the tensors; None where unknown."""

  kinds: str  # of the layers in order, GDN2 if recurrent, WINDOW if attention
  kda: bool  # whether the recurrent layers are Kimi Delta Attention
  vocab_size: int | None
  model_dim: int | None
  mlp_dim: int | None
  heads: int | None  # key heads H; of KDA, those of q and k
  decays: int | None  # heads that have a decay of their own
  value_heads: int | None
  key_dim: int | None
  value_dim: int | None
  conv_width: int | None
  qkv_rows: int | None  # of q, k and v together where they are one weight
  recurrent: str = GDN2  # letter of ours that recurrent layers become


def look_at(dialect: Dialect, tensors: Tensors, path: Any) -> Shown:
  """Reads sizes off the shapes; refuses gaps between the layers."""
  layers = dialect.layer_names(tensors)
  count = max(layers, default=-1) + 1
  if absent := sorted(set(range(count)) - set(layers)):
    raise ValueError(
      f"{path}: {count} layers, of which {len(absent)} are missing, the first "
      f"is {dialect.layer.format(absent[0])}*"
    )
  attention = {theirs for _, theirs, _ in dialect.attention}
  only_gdn2 = {dialect.mixer + name for name in _OF_GDN2 - attention}
  kinds = "".join(
    GDN2 if layers[n] & only_gdn2 else WINDOW for n in range(count)
  )

  def shape(name: str) -> tuple[int, ...]:
    return tuple(tensors[name].shape) if name in tensors else ()

  def mixer(kind: str, name: str) -> tuple[int, ...]:
    """Shape in the first layer of a kind."""
    return shape(dialect.layer.format(kinds.find(kind)) + dialect.mixer + name)

  def rows(kind: str, name: str) -> int | None:
    found = mixer(kind, name)
    return found[0] if found else None

  theirs = {ours: name for ours, name, _ in (*dialect.model, *dialect.block)}
  table = shape(theirs["embedding.table"])
  vocab_size, model_dim = table if len(table) == 2 else (None, None)
  gate = shape(dialect.layer.format(0) + theirs["mlp.gate.kernel"])
  decays, keys = rows(GDN2, "A_log"), rows(GDN2, "q_proj.weight")
  key_dim = _quotient(rows(GDN2, "dt_bias"), decays)
  value_dim = rows(GDN2, "o_norm.weight")
  return Shown(
    kinds=kinds,
    kda=decays is not None
    and not mixer(GDN2, "w_proj.weight")
    and rows(GDN2, "b_proj.weight") == decays,
    vocab_size=vocab_size,
    model_dim=model_dim,
    mlp_dim=gate[0] if gate else None,
    heads=_quotient(keys, key_dim),
    decays=decays,
    value_heads=_quotient(rows(GDN2, "v_proj.weight"), value_dim),
    key_dim=key_dim,
    value_dim=value_dim,
    conv_width=_quotient(math.prod(mixer(GDN2, "q_conv1d.weight")), keys),
    qkv_rows=rows(WINDOW, "attn.weight"),
  )


def _quotient(a: int | None, b: int | None) -> int | None:
  return a // b if a and b and a % b == 0 else None


class Claims:
  """Typed values of a config.json; records which keys were read."""

  def __init__(self, values: Mapping[str, Any], path: Any):
    self._values = dict(values)
    self._path = path
    self._asked: set[str] = set()

  def pass_over(self, *names: str) -> None:
    """Accepts keys with any value: nothing in this model reads them."""
    self._asked.update(names)

  def stated(self, name: str) -> bool:
    """True where the config has this key, even as null."""
    return name in self._values

  def raw(self, name: str, default: Any = None) -> Any:
    """Value of a key, unchecked; null gives the default."""
    self._asked.add(name)
    value = self._values.get(name)
    return default if value is None else value

  def number(self, name: str, default: float | None = None) -> float:
    """A finite positive number."""
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
    """A positive integer under one of these names, checked against `shown`."""
    given = [name for name in names if self.raw(name) is not None]
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
    """Refuses a key whose value selects what does not exist here."""
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

  def finish(
    self, ignored: Collection[str] = (), harmless: Collection[str] | None = ()
  ) -> list[str]:
    """Refuses keys that were not read, unless they are ignored or harmless.

    Programs that write many of them have `harmless` None: then only those are
    refused that look like a misspelt key. Returns the keys that were not read.
    """
    known = {*self._asked, *(harmless or ())}
    left = sorted(set(self._values) - known - set(ignored))
    close = {
      name: difflib.get_close_matches(name, known, n=1, cutoff=0.8)
      for name in left
      if not name.startswith("_")
    }
    refused = [name for name in close if harmless is not None or close[name]]
    if refused:
      told = [
        name + "".join(f" (did you mean {k}?)" for k in close[name])
        for name in refused
      ]
      raise ValueError(
        f"{self._path}: unknown keys {', '.join(told)}: they may change what "
        "the model computes; if they do not, pass --ignore_config="
        + ",".join(refused)
      )
    return left

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


def split_width(c: Claims, key: str, model_dim: int) -> tuple[int, int]:
  """Heads of attention under a key, and the channels of each."""
  heads = c.size(key)
  if model_dim % heads:
    c.refuse(key, f"a divisor of the width {model_dim}")
  return heads, model_dim // heads


def written_kinds(config: ModelConfig, program: str) -> str:
  """Kinds of all layers; refuses heads of attention of another width."""
  a, kinds = config.attention, config.pattern * config.num_groups
  if (
    set(kinds) - set(recurrent_letters(kinds))
    and a.num_heads * a.head_dim != config.model_dim
  ):
    raise ValueError(
      f"attention.num_heads={a.num_heads} of head_dim={a.head_dim}: {program} "
      f"has heads of model_dim={config.model_dim} together"
    )
  return kinds


def gdn2_keys(config: ModelConfig) -> dict[str, Any]:
  """Keys of the recurrent layers that both programs write."""
  c = config.gdn2
  return {
    "num_heads": c.num_heads,
    "num_v_heads": c.value_heads,
    "head_dim": c.key_dim,
    "allow_neg_eigval": c.negative_eigenvalues,
    "output_gate": c.output_gate,
  }


def gdn2_config(
  c: Claims, shown: Shown, output_gate: str, norm_eps: float
) -> GDN2Config:
  """Config of the recurrent layers, from keys that both programs have."""
  if GDN2 not in shown.kinds:
    return GDN2Config()
  heads = c.size("num_heads", "gdn2_num_heads", shown=shown.heads)
  value_heads = c.size(
    "num_v_heads", "gdn2_num_v_heads", shown=shown.value_heads, default=heads
  )
  if value_heads % heads:
    c.refuse("num_v_heads", f"a multiple of num_heads={heads}")
  if shown.kda and shown.decays not in (heads, value_heads):
    c.refuse("num_heads", f"decays of so many heads, not {shown.decays}")
  key_dim = c.size("head_dim", "gdn2_head_dim", shown=shown.key_dim)
  value_dim = shown.value_dim
  for name in ("expand_v", "gdn2_expand_v"):
    if c.raw(name) is not None:
      value_dim = _expanded(c, name, key_dim, value_dim)
  return GDN2Config(
    # Where KDA has a decay and a gate for every value head, each gets a key.
    num_heads=shown.decays if shown.kda else heads,
    num_value_heads=value_heads,
    key_dim=key_dim,
    value_dim=c.size("head_v_dim", shown=value_dim, default=key_dim),
    conv_width=c.size("conv_size", shown=shown.conv_width, default=4),
    negative_eigenvalues=c.boolean("allow_neg_eigval", False),
    output_gate=output_gate,
    norm_eps=norm_eps,
  )


def _expanded(c: Claims, name: str, key_dim: int, shown: int | None) -> int:
  """Value channels by their ratio to the key channels, a whole number."""
  value_dim = min(c.number(name) * key_dim, 2.0**31)
  if abs(value_dim - round(value_dim)) > 1e-5 * value_dim:
    c.refuse(name, f"a whole number of channels, times {key_dim}")
  if shown is not None and round(value_dim) != shown:
    c.refuse(name, f"{shown} / {key_dim}, by the tensors")
  return round(value_dim)
