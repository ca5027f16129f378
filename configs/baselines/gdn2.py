"""Gated DeltaNet-2, the model that the baselines are compared with.

Claim: the 120m_swa, 30m_swa, 1p3b and 1p3b_swa recipes are
configs/gdn2_120m.py, gdn2_30m.py, gdn2_1p3b.py and gdn2_swa_1p3b.py; 30m and
120m are recurrent models with as many parameters as those hybrids.
Cost: 1.2e16 to 1.3e16 FLOPs at 30m, 1.6e18 at 120m, 8.4e20 to 8.7e20 at 1p3b;
not run yet.

  python -m gdn2_jax.train --config=configs/baselines/gdn2.py:30m_swa \
      --workdir=runs/gdn2_30m_swa
"""

from gdn2_jax.configs.baselines import sized
from gdn2_jax.train.config import TrainConfig

_MLP_DIMS = (1024, 1008, 6208, 1280, 1344, 6784)


def get_config(recipe: str = "30m") -> TrainConfig:
  return sized(recipe, "G", _MLP_DIMS)
