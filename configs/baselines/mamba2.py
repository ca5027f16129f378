"""Mamba-2: a decay per head, and nothing is erased.

Claim: states of as many numbers as GDN-2's, with heads and B and C of 64
channels; twice the width would be 12.5 % more at 1p3b.
Cost: 1.2e16 to 1.3e16 FLOPs at 30m, 1.5e18 to 1.6e18 at 120m, 8.4e20 to 8.7e20
at 1p3b; not run yet.

  python -m gdn2_jax.train --config=configs/baselines/mamba2.py:30m_swa \
      --workdir=runs/mamba2_30m_swa
"""

from gdn2_jax.configs.baselines import sized, state_floats
from gdn2_jax.train.config import TrainConfig

_MLP_DIMS = (1152, 1136, 6336, 1344, 1408, 6848)


def get_config(recipe: str = "30m") -> TrainConfig:
  config = sized(recipe, "M", _MLP_DIMS)
  layer = config.model.mamba2
  layer.head_dim = layer.state_dim = 64
  layer.inner_dim = state_floats(config) // layer.state_dim
  return config
