"""Softmax attention, over all tokens or over a window.

Claim: as many parameters; 30m, 120m and 1p3b see all earlier tokens with a
cache that grows, and with _swa every layer sees its window alone (the paper's
Transformer).
Cost: 1.3e16 FLOPs at 30m, 1.7e18 to 1.8e18 at 120m, 9.0e20 to 9.3e20 at 1p3b;
not run yet.

  python -m gdn2_jax.train --config=configs/baselines/softmax.py:30m_swa \
      --workdir=runs/softmax_30m_swa
"""

from gdn2_jax.configs.baselines import sized
from gdn2_jax.train.config import TrainConfig

_MLP_DIMS = (1536, 1696, 7424, 1536, 1680, 7360)


def get_config(recipe: str = "30m") -> TrainConfig:
  return sized(recipe, "A", _MLP_DIMS, hybrid="S")
