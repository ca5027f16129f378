"""GDN-2 without decay: alpha = 1.

Claim: only the erase gate makes room; the parameters of the decay go into the
MLPs.
Cost: 1.2e16 to 1.3e16 FLOPs at 30m, 1.6e18 at 120m, 8.4e20 to 8.7e20 at 1p3b;
not run yet.

  python -m gdn2_jax.train --config=configs/ablations/no_decay.py:30m_swa \
      --workdir=runs/no_decay_30m_swa
"""

from gdn2_jax.configs.baselines import sized
from gdn2_jax.train.config import TrainConfig

_MLP_DIMS = (1104, 1088, 6272, 1328, 1392, 6848)


def get_config(recipe: str = "30m") -> TrainConfig:
  config = sized(recipe, "G", _MLP_DIMS)
  config.model.gdn2.decay = "none"
  return config
