"""The paper's recurrent 1.3B model: 18 GDN-2 layers.

Claim: 1,302,638,112 block parameters (1,450,096,416 with embedding, head and
final norm at a vocabulary of 32,000), exactly those of the public
configuration; a state of 19.5 MB a sequence, whatever its length.
Cost: 100B tokens, 8.4e20 FLOPs.
Memory: 45 GB on one device, with two rows of 4,096 tokens at a time and all
their activations kept (remat "none", all groups of layers unrolled: nothing is
computed twice, nothing copied into the stacks of a loop). On N devices that
split parameters and optimizer four rows fit: --config.grad_accum=32/N. Where
longer rows or smaller devices need it, recompute: --config.model.remat=full
--config.model.scan_unroll=1 takes a quarter more FLOPs and half the memory. Ask
gdn2_jax.plan first.
Data: a folder of packed rows, tokenised with a 32,000-entry Llama tokenizer.

  python -m gdn2_jax.plan --config=configs/gdn2_1p3b.py
  python -m gdn2_jax.train --config=configs/gdn2_1p3b.py \
      --workdir=runs/gdn2_1p3b
  python -m gdn2_jax.train --config=configs/gdn2_1p3b.py \
      --workdir=runs/gdn2_1p3b --config.mesh.fsdp=8 --config.grad_accum=4

Two recipes differ in the batch alone: the paper's text says 0.5M tokens, its
public training script 4.19M (1,024 rows). The script's is
`--config=configs/gdn2_1p3b.py:script`. Both decay every parameter; leave norms,
biases and decay parameters out with --config.optimizer.decay_mask=matrices.
"""

from gdn2_jax.data.pipeline import DataConfig
from gdn2_jax.eval.loss.perplexity import EvalConfig
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.train.config import CheckpointConfig, TrainConfig
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
      remat="none",
      scan_unroll=0,
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
    # Two rows at a time: four take 63 GB, and JAX takes 64 of an 80 GB device.
    grad_accum=rows // 2,
  )
