"""Protocol of a mixer, and the registry of layer kinds by their letters.

    y, cache = mixer(x, segment_ids, cache)

The same call serves training (no cache), prefill (T tokens) and decoding
(T = 1). A cache is an immutable pytree whose leaves have the batch axis first;
its size does not depend on the tokens that were read. Tokens with segment id 0
do not change the cache, and the first token of a segment starts from an empty
one.

`register` adds a kind from outside of the package: everything else, training,
checkpoints, generation, plans, asks the registry alone. A program that opens a
model of such a kind must import the module that registers it; commands import
the modules that the environment variable GDN2_JAX_MIXERS names, separated by
commas.
"""

import dataclasses
import importlib
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import jax
from flax import linen as nn

from gdn2_jax.typing import Activations, SegmentIds

PLUGINS = "GDN2_JAX_MIXERS"

Config = Any  # ModelConfig, which this module may not import
Size = tuple[str, str, int]
Option = bool | int | float | str


class Mixer(Protocol):
  """Layer that mixes tokens, with a cache across calls."""

  def __call__(
    self, x: Activations, segment_ids: SegmentIds | None, cache: Any
  ) -> tuple[Activations, Any]:
    """Mixes T tokens per row; see the module's docstring."""
    ...


def _nothing(config: Config, path: str) -> None:
  """Accepts every config."""


def _no_sizes(config: Config) -> list[Size]:
  """Names no size that a mesh must divide."""
  return []


def _not_split(config: Config) -> None:
  """Refuses rows whose tokens are split over devices."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixerKind:
  """Everything that the package asks about the layers of one letter.

  Only `name`, `make` and `init_cache` are required. Parameters are counted from
  the module; a mesh splits them by the logical axis names that they carry
  (`gdn2_jax.model.layers.parameter`).

  Attributes:
    name: Name in reports.
    make: make(config, name=..., dtype=..., param_dtype=...) returns the linen
      module, a Mixer, for a ModelConfig.
    init_cache: init_cache(config, batch_size, max_length) returns the empty
      cache of one layer, with leaves [B, ...].
    flops: flops(config, seq_len) returns the forward operations per token that
      are not products with parameters, the mean over a sequence.
    validate: validate(config, path) raises ValueError naming the first field
      under `path` that is wrong.
    sizes: sizes(config) lists (field, logical axis, size) that a mesh must
      divide; the field is a path below the model's config.
    min_shard: min_shard(config) returns the least tokens that a device may hold
      of a row that is split over devices; None: the mixer cannot be split so.
    state_floats: state_floats(config) returns the numbers in the recurrent
      state of one layer and sequence, 0 without one.
    has_fused_gates: has_fused_gates(config) returns True if the GPU kernels
      compute the gates from their projections, False if XLA computes them
      before, None for a mixer without such kernels.
    gates: Symbols of the arrays that the module sows, see `collect_gates`.
    options: Settings of a mixer from outside of the package with their
      defaults, by name; config.options changes them and `read_options` returns
      them.
    is_indexed: The module gets the cache of all layers at its place of the
      pattern and the index of its own (CacheLayer), to update it in place.
    grows: The cache has a slot for every token, max_length in all.
  """

  name: str
  make: Callable[..., nn.Module]
  init_cache: Callable[[Config, int, int | None], Any]
  flops: Callable[[Config, int], float] = lambda config, seq_len: 0.0
  validate: Callable[[Config, str], None] = _nothing
  sizes: Callable[[Config], list[Size]] = _no_sizes
  min_shard: Callable[[Config], int | None] = _not_split
  state_floats: Callable[[Config], int] = lambda config: 0
  has_fused_gates: Callable[[Config], bool | None] = lambda config: None
  gates: tuple[str, ...] = ()
  options: Mapping[str, Option] = dataclasses.field(default_factory=dict)
  is_indexed: bool = False
  grows: bool = False


_KINDS: dict[str, MixerKind] = {}
_BUILT_IN: set[str] = set()


def register(letter: str, kind: MixerKind, *, replace: bool = False) -> None:
  """Makes a letter of `config.model.pattern` stand for a mixer.

  Args:
    letter: One letter; built-in mixers use capital ones.
    kind: What the letter stands for.
    replace: Allow a letter that is in use, as a notebook's cell needs that runs
      twice. Built-in letters cannot be replaced.

  Raises:
    ValueError: the letter is not one letter, or in use.
  """
  if len(letter) != 1 or not letter.isalpha():
    raise ValueError(f"letter={letter!r}: expected one letter")
  used = _KINDS.get(letter)
  if used is not None:
    if not replace or letter in _BUILT_IN:
      raise ValueError(f"letter={letter!r}: in use, for {used.name}")
    # Programs are kept by config, which knows the letter alone.
    jax.clear_caches()
  _KINDS[letter] = kind


def register_built_in(letter: str, kind: MixerKind) -> None:
  """Registers a kind whose letter nobody can replace."""
  register(letter, kind)
  _BUILT_IN.add(letter)


def kind_of(letter: str) -> MixerKind:
  """The kind that a letter of a pattern stands for; ValueError if unknown."""
  if letter not in _KINDS:
    for module in filter(None, os.environ.get(PLUGINS, "").split(",")):
      importlib.import_module(module)
  if letter not in _KINDS:
    known = ", ".join(f"{k} ({v.name})" for k, v in _KINDS.items())
    raise ValueError(
      f"{letter!r} is no mixer: expected letters among {known}; a mixer of "
      f"your own must be registered first, or its module named in {PLUGINS}"
    )
  return _KINDS[letter]


def kinds_of(pattern: str) -> dict[str, MixerKind]:
  """The different kinds of a pattern by letter, in order of appearance."""
  return {letter: kind_of(letter) for letter in pattern}


def read_options(
  config: Config, defaults: Mapping[str, Option]
) -> dict[str, Option]:
  """Settings of a mixer, those of config.options over its defaults.

  Args:
    config: ModelConfig with options "name=value"; of other names they belong to
      other mixers.
    defaults: Value by name; it has the type that the text is read as.

  Raises:
    ValueError: A value is not of its default's type, or a name comes twice.
  """
  values = dict(defaults)
  for name, text in _split(config.options):
    if name in defaults:
      values[name] = _parse(name, text, type(defaults[name]))
  return values


def option_names(config: Config) -> list[str]:
  """Names in config.options; ValueError if one is given twice."""
  return [name for name, _ in _split(config.options)]


def check_options(config: Config, path: str) -> None:
  """Raises ValueError for an option that no mixer of the pattern has."""
  known: dict[str, Option] = {}
  for kind in kinds_of(config.pattern).values():
    known |= kind.options
  try:
    for name in option_names(config):
      if name not in known:
        names = ", ".join(known) or "none"
        raise ValueError(
          f"{name!r} is no setting of the mixers in pattern="
          f"{config.pattern!r}, which have {names}"
        )
    read_options(config, known)
  except ValueError as e:
    raise ValueError(f"{path}.options={config.options!r}: {e}") from None


def _split(options: Iterable[str]) -> list[tuple[str, str]]:
  """Names and texts of "name=value"; no name twice."""
  pairs = []
  for option in options:
    name, equals, text = option.partition("=")
    if not (name and equals):
      raise ValueError(f"{option!r}: expected 'name=value'")
    if name in dict(pairs):
      raise ValueError(f"{name!r} is given twice")
    pairs.append((name, text))
  return pairs


def _parse(name: str, text: str, kind: type) -> Option:
  """The value that a text stands for."""
  if kind is bool:
    if text not in ("true", "false"):
      raise ValueError(f"{name}={text!r}: expected true or false")
    return text == "true"
  try:
    return kind(text)
  except ValueError:
    expected = {int: "an integer", float: "a number"}[kind]
    raise ValueError(f"{name}={text!r}: expected {expected}") from None
