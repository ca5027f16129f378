"""The paper's recurrent 1.3B model: 18 GDN-2 layers.

Claim: 1,302,638,112 block parameters (1,450,096,416 with embedding, head and
final norm at a vocabulary of 32,000), exactly those of the public
configuration; a state of 19.5 MB a sequence, whatever its length.
Cost: 100B tokens, 8.4e20 FLOPs.
Memory: a step is eight microbatches; for more or fewer devices change
--config.grad_accum, and ask gdn2_jax.plan first.
Data: a folder of packed rows, tokenised with a 32,000-entry Llama tokenizer.

  python -m gdn2_jax.plan --config=configs/gdn2_1p3b.py
  python -m gdn2_jax.train --config=configs/gdn2_1p3b.py \
      --workdir=runs/gdn2_1p3b --config.mesh.fsdp=-1

Two recipes differ in the batch alone: the paper's text says 0.5M tokens, its
public training script 4.19M (1,024 rows). The script's is
`--config=configs/gdn2_1p3b.py:script`. Both decay every parameter; leave norms,
biases and decay parameters out with --config.optimizer.decay_mask=matrices.
"""

from gdn2_jax.data.pipeline import DataConfig
from gdn2_jax.eval.perplexity import EvalConfig
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.train.checkpoint_config import CheckpointConfig
from gdn2_jax.train.config import TrainConfig
from gdn2_jax.train.optimizer import OptimizerConfig

TOKENS = 100e9
ROWS = {"paper": 128, "script": 1024}  # rows of 4,096 tokens in a batch


def get_config(recipe: str = "paper") -> TrainConfig:
  if recipe not in ROWS:
    raise ValueError(
      f"recipe {recipe!r}: expected one of {sorted(ROWS)}, as in "
      "--config=configs/gdn2_1p3b.py:script"
    )
  rows, seq_len = ROWS[recipe], 4096
  return TrainConfig(
    model=ModelConfig(
      vocab_size=32000,
      model_dim=2304,
      num_layers=18,
      pattern="G",
      mlp_dim=6208,
      dtype="bfloat16",
      remat="full",
      loss_chunk=1024,
    ),
    data=DataConfig(
      source="data/fineweb_edu",
      tokenizer="data/fineweb_edu/tokenizer.json",
      seq_len=seq_len,
      batch_size=rows,
    ),
    optimizer=OptimizerConfig(
      lr=4e-4,
      final_lr=4e-5,
      warmup_fraction=0.01,
      b1=0.9,
      b2=0.95,
      weight_decay=0.1,
      clip_norm=1.0,
    ),
    checkpoint=CheckpointConfig(every_steps=1000),
    eval=EvalConfig(every_steps=1000, batches=64, batch_size=16),
    num_steps=round(TOKENS / (rows * seq_len)),
    grad_accum=8,
  )
