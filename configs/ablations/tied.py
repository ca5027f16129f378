"""GDN-2 with one gate per head for erasing and writing.

Claim: the same function as configs/baselines/kda.py, as a setting of GDN-2.
Cost: 1.2e16 to 1.3e16 FLOPs at 30m, 1.6e18 at 120m, 8.4e20 to 8.7e20 at 1p3b;
not run yet.

  python -m gdn2_jax.train --config=configs/ablations/tied.py:30m_swa \
      --workdir=runs/tied_30m_swa
"""

from gdn2_jax.configs.baselines import sized
from gdn2_jax.train.config import TrainConfig

_MLP_DIMS = (1360, 1520, 7552, 1456, 1600, 7488)


def get_config(recipe: str = "30m") -> TrainConfig:
  config = sized(recipe, "G", _MLP_DIMS)
  config.model.gdn2.gates = "tied"
  return config
