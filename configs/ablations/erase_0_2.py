"""GDN-2 with an erase gate in [0, 2] (Table 5).

Claim: negative eigenvalues of the transition; parameters are those of GDN-2.
Cost: 1.2e16 to 1.3e16 FLOPs at 30m, 1.6e18 at 120m, 8.4e20 to 8.7e20 at 1p3b;
not run yet.

  python -m gdn2_jax.train --config=configs/ablations/erase_0_2.py:30m_swa \
      --workdir=runs/erase_0_2_30m_swa
"""

from gdn2_jax.configs.baselines import gdn2
from gdn2_jax.train.config import TrainConfig


def get_config(recipe: str = "30m") -> TrainConfig:
  config = gdn2.get_config(recipe)
  config.model.gdn2.negative_eigenvalues = True
  return config
