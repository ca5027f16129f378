"""The softmax transformer beside configs/tiny_cpu.py: full attention only.

Claim: the same width, layers, data and steps, and as many parameters to 0.1%,
so that losses can be compared; its cache grows with every token.
Cost: about five minutes on two cores; nothing is downloaded.

  python -m gdn2_jax.train --config=configs/softmax_tiny_cpu.py \
      --workdir=runs/softmax_tiny_cpu
"""

from gdn2_jax.configs import tiny_cpu
from gdn2_jax.train.config import TrainConfig


def get_config() -> TrainConfig:
  config = tiny_cpu.get_config()
  config.model.pattern = "A"
  config.model.mlp_dim = 408
  return config
