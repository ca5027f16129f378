"""A 124M hybrid for one GPU.

Claim: large enough to compare architectures; 2.5B tokens are 20 a parameter.
Cost: 2.5B tokens, 1.6e18 FLOPs (4.4 hours at 100 TFLOP/s; not run yet).
Data: a folder of packed rows, tokenised with a 32,000-entry tokenizer.

  python -m gdn2_jax.train --config=configs/gdn2_120m.py \
      --workdir=runs/gdn2_120m
"""

from gdn2_jax.configs import gdn2_1p3b
from gdn2_jax.train.config import TrainConfig


def get_config() -> TrainConfig:
  config = gdn2_1p3b.get_config()
  config.model.pattern = "GS"
  config.model.model_dim = 768
  config.model.num_layers = 12
  config.model.mlp_dim = 1344
  config.model.gdn2.num_heads = 6
  config.model.attention.num_heads = 6
  config.model.attention.window = 1024
  config.data.seq_len = 2048
  config.data.batch_size = 64
  config.grad_accum = 4
  config.optimizer.lr = 1e-3
  config.optimizer.final_lr = 1e-4
  config.num_steps = round(2.5e9 / (64 * 2048))
  return config
