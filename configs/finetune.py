r"""Fine-tuning, or continued training, of a model that exists.

Claim: none; the model, its dtype and its tokenizer are those of the source, and
the optimizer starts anew with a quarter of the usual learning rate.
Cost: that of the source's model on your text; ask `gdn2 plan`.

  gdn2 train --config=finetune:models/hybrid --workdir=runs/mine \
      --config.data.source=text:my_documents/
  python -m gdn2_jax.train --config=configs/finetune.py:runs/tiny_cpu \
      --workdir=runs/mine --config.data.source=text:my_documents/

The source is the workdir of a run, a folder that `gdn2 export` or `gdn2
convert` wrote, or hf:USER/NAME@REVISION. One without tokenizer.json needs
--config.data.tokenizer=FILE, the tokenizer that it was trained with.
"""

import dataclasses

from gdn2_jax.data.pipeline import DataConfig
from gdn2_jax.eval.loss.perplexity import EvalConfig
from gdn2_jax.train.config import CheckpointConfig, TrainConfig
from gdn2_jax.train.optimizer import OptimizerConfig
from gdn2_jax.train.start import read_model


def get_config(source: str = "") -> TrainConfig:
  if not source:
    raise ValueError(
      "source is missing: expected --config=finetune:SOURCE with a run, a "
      "published folder or hf:USER/NAME@REVISION"
    )
  model, tokenizer = read_model(source)
  return TrainConfig(
    init_from=source,
    # Published parameters may be rounded to 16 bits: too few for updates.
    model=dataclasses.replace(model, param_dtype="float32"),
    data=DataConfig(
      source="embedded",
      tokenizer=str(tokenizer or f"{source}/tokenizer.json"),
      seq_len=512,
      batch_size=8,
    ),
    optimizer=OptimizerConfig(
      lr=1e-4, final_lr=1e-5, warmup_fraction=0.05, decay_mask="matrices"
    ),
    checkpoint=CheckpointConfig(every_steps=200),
    eval=EvalConfig(every_steps=100, length_multiples=(1,)),
    num_steps=400,
  )
