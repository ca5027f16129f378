"""Models of equal size: MLP widths that compensate for other mixers.

Two models are on equal footing if the parameters of their blocks agree within
0.3 % and the recurrent states of their layers have equally many numbers. Data,
optimizer, width and depth are the config's affair.
"""

import dataclasses

from gdn2_jax.model.accounting import count_parameters
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.mixers.registry import kinds_of

TOLERANCE = 0.003  # of the parameters of the blocks

# Divisors of MLP widths, the best first. Tensor cores of an H100 multiply tiles
# of 64 rows; copies of matrices are aligned to 16 bytes, 8 bfloat16 numbers.
MULTIPLES = (128, 64, 32, 16, 8)


def matched_mlp_dim(
  config: ModelConfig,
  reference: ModelConfig,
  *,
  tolerance: float = TOLERANCE,
  multiples: tuple[int, ...] = MULTIPLES,
) -> int:
  """MLP width that gives `config` as many block parameters as `reference`.

  Args:
    config: Model whose mlp_dim is sought; its own value is not used.
    reference: Model to match.
    tolerance: Largest relative difference of the block parameters.
    multiples: Divisors of the width in order of preference.

  Returns:
    The nearest multiple of the first divisor that keeps the tolerance.

  Raises:
    ValueError: No divisor does, or the recurrent states differ in size.
  """
  check_states(config, reference)
  target = count_parameters(reference).blocks
  # The blocks are linear in the width: an MLP has three matrices of it.
  per_column = 3 * config.model_dim * config.num_layers
  one = dataclasses.replace(config, mlp_dim=1)
  rest = count_parameters(one).blocks - per_column
  for multiple in multiples:
    width = round((target - rest) / (per_column * multiple)) * multiple
    missing = abs(rest + per_column * width - target)
    if width >= 1 and missing <= tolerance * target:
      return width
  raise ValueError(
    f"pattern={config.pattern!r}: no mlp_dim that is a multiple of "
    f"{multiples[-1]} gives {target:,} block parameters within "
    f"{tolerance:.1%}; the mixers and norms have {rest:,}"
  )


def check_states(config: ModelConfig, reference: ModelConfig) -> None:
  """Raises ValueError if recurrent layers have states of different sizes."""
  found, expected = layer_states(config), layer_states(reference)
  if found and expected and found != expected:
    raise ValueError(
      f"pattern={config.pattern!r}: recurrent states of {sorted(found)} "
      f"numbers a layer, expected {sorted(expected)} as in pattern="
      f"{reference.pattern!r}"
    )


def layer_states(config: ModelConfig) -> set[int]:
  """Sizes of the recurrent states of the layers that have one."""
  kinds = kinds_of(config.pattern).values()
  return {kind.state_floats(config) for kind in kinds} - {0}
