"""A small hybrid that learns real text on two CPU cores in five minutes.

Claim: its held-out loss beats a unigram and a smoothed bigram model fitted on
the same training tokens.
Cost: about five minutes on two cores; nothing is downloaded.

  make train
  python -m gdn2_jax.train --config=configs/tiny_cpu.py --workdir=runs/tiny_cpu
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
      model_dim=128,
      num_layers=4,
      pattern="GS",
      mlp_dim=320,
      gdn2=GDN2Config(num_heads=2, key_dim=64, value_dim=64),
      attention=AttentionConfig(num_heads=4, head_dim=32, window=128),
      dtype="float32",
    ),
    data=DataConfig(
      source="embedded", tokenizer="bpe-4096", seq_len=256, batch_size=8
    ),
    optimizer=OptimizerConfig(
      lr=4e-3, final_lr=4e-4, warmup_fraction=0.05, decay_mask="matrices"
    ),
    checkpoint=CheckpointConfig(every_steps=200),
    eval=EvalConfig(every_steps=100, batches=16, batch_size=8),
    num_steps=600,
  )
