"""The paper's hybrid 1.3B model: GDN-2 and sliding-window attention in turn.

Claim: 1,300,314,384 block parameters (1,447,772,688 with embedding, head and
final norm); nine GDN-2 layers and nine attention layers with a window of 2,048
tokens; the state of a sequence stops growing at the window.
Cost: 100B tokens, 8.7e20 FLOPs; the paper reports 38,000 tokens/s on one
H100 at 2,048 x 8 tokens (its Figure 2).

  python -m gdn2_jax.train --config=configs/gdn2_swa_1p3b.py \
      --workdir=runs/gdn2_swa_1p3b --config.mesh.fsdp=8 --config.grad_accum=4

Memory: 58 GB on one device, with four rows at a time; the rest, and the two
recipes, as in configs/gdn2_1p3b.py. Append `:script` for the larger batch.
"""

from gdn2_jax.configs import gdn2_1p3b
from gdn2_jax.train.config import TrainConfig


def get_config(recipe: str = "paper") -> TrainConfig:
  config = gdn2_1p3b.get_config(recipe)
  config.model.pattern = "GS"
  config.model.mlp_dim = 6784
  config.model.attention.num_heads = 18
  config.model.attention.window = 2048
  config.grad_accum = config.data.batch_size // 4
  return config
