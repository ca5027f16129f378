"""Gated DeltaNet: one gate and one decay per head.

Claim: GDN-2's convolutions and output gate; decay and beta are one number per
head and token, and the parameters that this saves go into the MLPs.
Cost: 1.2e16 to 1.3e16 FLOPs at 30m, 1.6e18 at 120m, 8.4e20 to 8.7e20 at 1p3b;
not run yet.

  python -m gdn2_jax.train --config=configs/baselines/gdn.py:30m_swa \
      --workdir=runs/gdn_30m_swa
"""

from gdn2_jax.configs.baselines import sized
from gdn2_jax.train.config import TrainConfig

_MLP_DIMS = (1448, 1600, 7616, 1488, 1648, 7488)


def get_config(recipe: str = "30m") -> TrainConfig:
  return sized(recipe, "D", _MLP_DIMS)
