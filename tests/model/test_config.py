"""The fields of a model's config: which of them decide the function."""

import dataclasses

import pytest

from gdn2_jax.inference.identity import function_of
from gdn2_jax.model.config import EXECUTION, LAYOUT, NUMERICS, ModelConfig
from gdn2_jax.train.checkpoint import meta
from gdn2_jax.train.config import TrainConfig

SMALL = ModelConfig(num_layers=4, scan_unroll=1)


def changed(name):
  """SMALL, and in its parts, with another value of that field."""
  other = {
    "dtype": "float16",
    "implementation": "xla",
    "loss_chunk": 7,
    "remat": "full",
    "scan_layers": False,
    "scan_unroll": 2,
    "norm_eps": 1e-3,
  }
  parts = {"gdn2": SMALL.gdn2, "attention": SMALL.attention}
  for part, config in parts.items():
    if hasattr(config, name):
      parts[part] = dataclasses.replace(config, **{name: other[name]})
  own = {name: other[name]} if hasattr(SMALL, name) else {}
  return dataclasses.replace(SMALL, **parts, **own)


def is_resumed(new):
  def stored(model):
    config = TrainConfig(model=model)
    return meta.make_meta(config, "data", {}, {})

  try:
    meta.check_meta(stored(SMALL), stored(new), allow_data_change=False)
  except meta.CheckpointError:
    return False
  return True


# field: whether a run goes on, and whether a saved state is taken.
@pytest.mark.parametrize(
  ("name", "resumed", "state_taken"),
  [
    *((name, True, True) for name in EXECUTION),
    *((name, True, False) for name in NUMERICS),
    *((name, False, True) for name in LAYOUT),
    ("norm_eps", False, False),
  ],
)
def test_a_change_of_a_field_is_taken_or_refused(name, resumed, state_taken):
  new = changed(name)
  assert new != SMALL
  assert is_resumed(new) == resumed
  assert (function_of(new) == function_of(SMALL)) == state_taken
