"""Directions of updates by name, from optax, and the registry of names.

    x -= lr_t (direction_t + weight_decay x)

A name chooses only the direction. Clipping, the schedule and decoupled weight
decay are those of OptimizerConfig for every name, so that runs which differ in
the name differ in nothing else.

  adamw      Adam (arXiv 1711.05101)
  adam       the same without weight decay
  nadamw     Adam with Nesterov momentum
  muon       momentum made orthogonal, of matrices (see `muon_dimensions`);
             Adam for the other parameters
  lion       sign of the momentum (arXiv 2302.06675)
  adafactor  factored second moments (arXiv 1804.04235)
  sgd        momentum
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from gdn2_jax.config_class import one_of
from gdn2_jax.model.mixers.registry import Option, option_names, read_options

# A parameter with only these axes is one vector per head, not a matrix. In a
# matrix they are one side together: a kernel [D, H, K] is D x (H K).
HEAD_AXES = {
  "heads",
  "kv_heads",
  "key_dim",
  "value_dim",
  "head_dim",
  "mimo_rank",
}
# The embedding, the head and depthwise convolutions: no maps between features.
_NOT_MUON = {"vocab", "taps"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
  """Values that a direction is made from.

  Attributes:
    options: settings of the kind by name, those of the config over the
      defaults.
    b1, b2, eps: the fields of OptimizerConfig.
    boxed_params: shapes of the parameters in boxes with logical axis names.
  """

  options: Mapping[str, Any]
  b1: float
  b2: float
  eps: float
  boxed_params: Any

  def adam(self, **options: Any) -> optax.GradientTransformation:
    """Adam's direction with b1, b2 and eps."""
    return optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerKind:
  """Everything that training asks about an optimizer's name.

  Attributes:
    make: function of a Setup that returns the transformation of gradients
      (after clipping) to directions, such as `optax.scale_by_lion`; the sign is
      that of the gradient. An optax function that takes a learning rate returns
      a direction if that is -1.
    options: settings with their defaults, by name; the texts "name=value" of
      config.optimizer.options change them, and Setup.options has the values.
    check: function of these values that raises ValueError for a wrong one.
    reads: fields among b1, b2 and eps of OptimizerConfig that it uses; values
      of others are refused unless they are the defaults.
    decays: weight decay is applied.
  """

  make: Callable[[Setup], optax.GradientTransformation]
  options: Mapping[str, Option] = dataclasses.field(default_factory=dict)
  check: Callable[[Mapping[str, Option]], None] = lambda options: None
  reads: tuple[str, ...] = ()
  decays: bool = True


_KINDS: dict[str, OptimizerKind] = {}


def register_optimizer(
  name: str, kind: OptimizerKind, *, replace: bool = False
) -> None:
  """Makes a name of `config.optimizer.name` stand for an optimizer.

  Register it in the config file if commands are to know the name.

  Args:
    name: not one of the package's.
    kind: what the name stands for.
    replace: allow a name that was registered before, as a notebook's cell needs
      that runs twice.

  Raises:
    ValueError: the name is in use.
  """
  if name in _BUILT_IN or (name in _KINDS and not replace):
    raise ValueError(f"name={name!r}: in use")
  _KINDS[name] = kind


def kind_of(name: str) -> OptimizerKind:
  """The kind of a name; ValueError with the nearest name if unknown."""
  if name not in _KINDS:
    raise ValueError(f"expected {one_of(name, tuple(_KINDS))}")
  return _KINDS[name]


def options_of(config: Any) -> dict[str, Option]:
  """Settings of the optimizer of an OptimizerConfig.

  Raises:
    ValueError: an option that it does not have, or a wrong value.
  """
  kind = kind_of(config.name)
  for name in option_names(config):
    if name not in kind.options:
      expected = one_of(name, tuple(kind.options))
      raise ValueError(
        f"{name!r} is no setting of {config.name}; expected {expected}"
      )
  values = read_options(config, kind.options)
  kind.check(values)
  return values


def muon_dimensions(boxed_params: Any) -> Any:
  """Axes of the rows and columns of every matrix, None for other parameters.

  The axis names of a parameter decide. Those of heads and their channels are
  one side of the matrix together, and an axis "layers" stacks matrices:
  [D, H, K] is D x (H K), [H, V, D] is (H V) x D. Parameters with other than two
  sides, the embedding, the head and convolutions are no such matrices.
  """

  def dimensions(leaf: nn.LogicallyPartitioned) -> MuonDimensionNumbers | None:
    sides: list[list[int]] = []
    was_head = False
    for axis, name in enumerate(leaf.names):
      if name == "layers":
        continue
      is_head = name in HEAD_AXES
      if is_head and was_head:
        sides[-1].append(axis)
      else:
        sides.append([axis])
      was_head = is_head
    if len(sides) != 2 or _NOT_MUON & set(leaf.names):
      return None
    return MuonDimensionNumbers(tuple(sides[0]), tuple(sides[1]))

  return map_boxes(dimensions, boxed_params)


def map_boxes(function: Callable[[Any], Any], boxed_params: Any) -> Any:
  """The tree of `function(box)` for parameters boxed with axis names."""
  return jax.tree.map(
    function,
    boxed_params,
    is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned),
  )


def _muon(setup: Setup) -> optax.GradientTransformation:
  """Muon for matrices, Adam for other parameters."""
  options = setup.options
  numbers = muon_dimensions(setup.boxed_params)
  labels = jax.tree.map(
    lambda n: "adam" if n is None else "muon", numbers, is_leaf=_is_number
  )
  # optax.partition hides the parameters of the other label like this.
  numbers = jax.tree.map(
    lambda n: optax.MaskedNode() if n is None else n,
    numbers,
    is_leaf=_is_number,
  )
  muon = optax.chain(
    scale_by_muon(
      ns_steps=options["ns_steps"],
      beta=options["beta"],
      nesterov=options["nesterov"],
      weight_dimension_numbers=numbers,
    ),
    _scale_to_rms(numbers, options["rms"]),
  )
  return optax.partition({"muon": muon, "adam": setup.adam()}, labels)


def _is_number(leaf: Any) -> bool:
  return leaf is None or isinstance(leaf, MuonDimensionNumbers)


def _scale_to_rms(numbers: Any, rms: float) -> optax.GradientTransformation:
  """Scales orthogonal matrices to a root mean square of `rms`.

  Entries of an orthogonal m x n matrix have 1 / sqrt(max(m, n)). With 0.2 they
  are about as large as Adam's, and learning rates carry over (arXiv 2502.16982,
  section 2.2).
  """

  def scale(update, number):
    if isinstance(update, optax.MaskedNode):
      return update
    sides = (math.prod(update.shape[i] for i in axes) for axes in number)
    return update * (rms * math.sqrt(max(sides)))

  def is_hidden(update):
    return isinstance(update, optax.MaskedNode)

  return optax.stateless(
    lambda updates, params: jax.tree.map(
      scale, updates, numbers, is_leaf=is_hidden
    )
  )


def _adafactor(setup: Setup) -> optax.GradientTransformation:
  options = setup.options
  parts = [
    optax.scale_by_factored_rms(
      decay_rate=options["decay_rate"],
      min_dim_size_to_factor=options["min_dim_size_to_factor"],
    )
  ]
  if options["clipping_threshold"]:
    parts.append(optax.clip_by_block_rms(options["clipping_threshold"]))
  if options["multiply_by_parameter_scale"]:
    parts.append(optax.scale_by_param_block_rms())
  if options["momentum"]:
    parts.append(optax.ema(options["momentum"], debias=False))
  return optax.chain(*parts)


_UNIT = {"b1", "b2", "beta", "momentum", "decay_rate"}
_COUNTS = {"ns_steps", "min_dim_size_to_factor"}


def _check(options: Mapping[str, Option]) -> None:
  """Refuses numbers out of range."""
  for name, value in options.items():
    if isinstance(value, bool):
      continue
    if name in _UNIT:
      ok, expected = 0 <= value < 1, "a number x with 0 <= x < 1"
    elif name in _COUNTS:
      ok, expected = value >= 1, "1 or more"
    elif name == "rms":
      ok, expected = 0 < value < math.inf, "a positive number"
    else:
      ok, expected = 0 <= value < math.inf, "a number, 0 or more"
    if not ok:
      raise ValueError(f"{name}={value}: expected {expected}")


_ADAM = ("b1", "b2", "eps")

_KINDS |= {
  "adamw": OptimizerKind(make=lambda setup: setup.adam(), reads=_ADAM),
  "adam": OptimizerKind(
    make=lambda setup: setup.adam(), reads=_ADAM, decays=False
  ),
  "nadamw": OptimizerKind(
    make=lambda setup: setup.adam(nesterov=True), reads=_ADAM
  ),
  "muon": OptimizerKind(
    make=_muon,
    options={"beta": 0.95, "nesterov": True, "ns_steps": 5, "rms": 0.2},
    check=_check,
    reads=_ADAM,
  ),
  "lion": OptimizerKind(
    make=lambda setup: optax.scale_by_lion(**setup.options),
    options={"b1": 0.9, "b2": 0.99},
    check=_check,
  ),
  "adafactor": OptimizerKind(
    make=_adafactor,
    options={
      "decay_rate": 0.8,
      "min_dim_size_to_factor": 128,
      "clipping_threshold": 1.0,
      "multiply_by_parameter_scale": False,
      "momentum": 0.0,
    },
    check=_check,
  ),
  "sgd": OptimizerKind(
    make=lambda setup: optax.trace(
      decay=setup.options["momentum"], nesterov=setup.options["nesterov"]
    ),
    options={"momentum": 0.9, "nesterov": False},
    check=_check,
  ),
}
_BUILT_IN = frozenset(_KINDS)
