"""Mamba-3, MIMO of rank 4: four inputs and outputs a head and token.

Claim: configs/baselines/mamba3.py with four times the columns of B and C.
Cost: 1.3e16 FLOPs at 30m, 1.7e18 at 120m, 8.5e20 to 8.7e20 at 1p3b; not run
yet.

  python -m gdn2_jax.train --config=configs/baselines/mamba3_mimo.py:30m_swa \
      --workdir=runs/mamba3_mimo_30m_swa
"""

from gdn2_jax.configs.baselines import mamba3, sized
from gdn2_jax.train.config import TrainConfig

_MLP_DIMS = (992, 976, 6144, 1264, 1328, 6720)


def get_config(recipe: str = "30m") -> TrainConfig:
  config = sized(recipe, "N", _MLP_DIMS)
  config.model.mamba3 = mamba3.get_config(recipe).model.mamba3
  config.model.mamba3.mimo_rank = 4
  return config
