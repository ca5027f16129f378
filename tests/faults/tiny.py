"""A run so small that starting takes longer than training."""

from gdn2_jax.train.config import TrainConfig


def tiny_config(cache_dir: str, num_steps: int) -> TrainConfig:
  """A hybrid of two layers, 32 wide, on the bytes of the text in the package.

  The token scan stands in for the chunkwise recurrence: it compiles in half the
  time, and nothing that is done to the run depends on which one it is.

  Args:
    cache_dir: where the packed rows are kept.
    num_steps: of the run; every one is logged and saved.

  Returns:
    A config with all devices along `fsdp`.
  """
  config = TrainConfig(num_steps=num_steps, log_every=1, max_skipped=2)
  model = config.model
  model.vocab_size, model.model_dim, model.mlp_dim = 260, 32, 32
  model.num_layers, model.pattern = 2, "GS"
  model.gdn2.num_heads = 2
  model.gdn2.key_dim = model.gdn2.value_dim = 16
  model.gdn2.implementation = "reference"
  model.attention.num_heads = 2
  model.attention.head_dim = model.attention.window = 8
  model.dtype = "float32"
  model.loss_chunk = 32
  model.scan_layers = False
  data = config.data
  data.source, data.tokenizer = "snapshot", "bytes"
  data.seq_len, data.batch_size = 16, 8
  data.cache_dir = cache_dir
  data.num_threads = 0
  config.optimizer.lr, config.optimizer.final_lr = 1e-2, 1e-3
  config.optimizer.warmup_fraction = 0.2
  config.mesh.fsdp = -1
  config.checkpoint.every_steps, config.checkpoint.keep = 1, 3
  config.eval.every_steps = 0
  config.eval.batches = 1
  config.eval.batch_size = 8
  config.eval.length_multiples = (1,)
  config.report.gates = False
  return config
