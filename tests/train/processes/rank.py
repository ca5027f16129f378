"""The real command, writing the bits of every loss on every process.

`python -m tests.train.processes.rank` takes the flags of
`python -m gdn2_jax.train`. Each process writes its id to
WORKDIR/pid-PROCESS, and appends lines "STEP LOSS GRADIENT_NORM" in hexadecimal
to WORKDIR/losses-PROCESS.
"""

import functools
import os
import pathlib

import jax
from absl import flags

from gdn2_jax import cli
from gdn2_jax.sharding import MeshConfig
from gdn2_jax.train.config import TrainConfig
from gdn2_jax.train.report.report import Progress
from tests.train.conftest import make_config


def two_process_config(cache_dir: str) -> TrainConfig:
  """fsdp 2 x tensor 2, as small as it gets: almost all time is compiling."""
  config = make_config(cache_dir)
  config.model.model_dim = config.model.mlp_dim = 16
  config.mesh = MeshConfig(fsdp=2, tensor=2)
  config.grad_accum = 1
  config.data.seq_len, config.data.batch_size = 8, 4
  config.num_steps = 5000
  config.checkpoint.every_steps = 4
  config.checkpoint.keep = 100
  return config


def main(argv: list[str], train) -> None:
  root = pathlib.Path(flags.FLAGS.workdir)
  (root / f"pid-{flags.FLAGS.process_id}").write_text(str(os.getpid()))
  row = Progress.row

  def row_with_bits(self, step, values):
    bits = [float(values[name]).hex() for name in ("loss", "grad_norm")]
    with open(root / f"losses-{jax.process_index()}", "a") as file:
      file.write(" ".join([str(step), *bits]) + "\n")
    row(self, step, values)

  Progress.row = row_with_bits
  train(argv)


if __name__ == "__main__":
  # Not at the top: it defines flags, and other tests import its peers.
  from gdn2_jax.train import __main__

  cli.run(functools.partial(main, train=__main__.main), __doc__)
