"""GDN-2 with one erase gate per head, and no parameters for more.

Claim: like w_only, with a projection to one number per head in place of an
average; the parameters that this saves go into the MLPs.
Cost: 1.2e16 to 1.3e16 FLOPs at 30m, 1.6e18 at 120m, 8.4e20 to 8.7e20 at 1p3b;
not run yet.

  python -m gdn2_jax.train --config=configs/ablations/w_only_head.py:30m_swa \
      --workdir=runs/w_only_head_30m_swa
"""

from gdn2_jax.configs.baselines import sized
from gdn2_jax.train.config import TrainConfig

_MLP_DIMS = (1200, 1264, 6912, 1360, 1472, 7104)


def get_config(recipe: str = "30m") -> TrainConfig:
  config = sized(recipe, "G", _MLP_DIMS)
  config.model.gdn2.erase_gate = "head"
  return config
