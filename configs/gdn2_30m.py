"""A 31M hybrid: the smallest model worth an evaluation, offline as it stands.

Claim: trains without any download, on the corpus that ships with Python; give
it a folder of packed rows to learn more than Python's documentation.
Cost: 66M tokens, 1.3e16 FLOPs (1.5 days at 100 GFLOP/s, a CPU core; not run
yet).

  python -m gdn2_jax.train --config=configs/gdn2_30m.py --workdir=runs/gdn2_30m
"""

from gdn2_jax.data.pipeline import DataConfig
from gdn2_jax.eval.loss.perplexity import EvalConfig
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.mixers.attention import AttentionConfig
from gdn2_jax.model.mixers.gdn2 import GDN2Config
from gdn2_jax.train.config import CheckpointConfig, TrainConfig
from gdn2_jax.train.optimizer import OptimizerConfig


def get_config() -> TrainConfig:
  return TrainConfig(
    model=ModelConfig(
      vocab_size=4096,
      model_dim=512,
      num_layers=8,
      pattern="GS",
      mlp_dim=1280,
      gdn2=GDN2Config(num_heads=4, key_dim=128, value_dim=128),
      attention=AttentionConfig(num_heads=8, head_dim=64, window=512),
      dtype="bfloat16",
    ),
    data=DataConfig(
      source="embedded", tokenizer="bpe-4096", seq_len=1024, batch_size=32
    ),
    optimizer=OptimizerConfig(lr=1e-3, final_lr=1e-4, warmup_fraction=0.05),
    checkpoint=CheckpointConfig(every_steps=500),
    eval=EvalConfig(every_steps=250),
    num_steps=2000,
  )
