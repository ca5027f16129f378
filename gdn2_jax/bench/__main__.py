r"""Benchmarks of the op, of the GPU kernels and of serving.

  python -m gdn2_jax.bench op [--spec=small,large] [--json=FILE] [--peers]
  python -m gdn2_jax.bench gpu [--rehearse] [--seconds=510]
  python -m gdn2_jax.bench serve [--lengths=1K,16K] [--batches=1,8] \
    [--preset=small] [--price_per_hour=2.5] [--json=FILE] [--plot=FILE.png]
  python -m gdn2_jax.bench pieces [--pieces=64,512] [--prompt_tokens=8192]

Subcommands:
  op    gdn2: error, time, memory and compile time of each implementation,
        decoding against copy bandwidth, time against length.
  gpu   on an NVIDIA GPU: every kernel checked and timed against "xla", the
        training step of the 1.3B hybrid, fla's kernels; under nine minutes.
  serve time, memory and cost of a token against context and batch: GDN-2, the
        hybrid and a softmax transformer of the same size, after up to 256K
        tokens.
  pieces time of a token of other answers while a long prompt is read in pieces
        between their steps, against nothing else happening.

Except for pieces, all results are checked before they are timed.
"""

from absl import flags

from gdn2_jax import cli
from gdn2_jax.bench import pieces
from gdn2_jax.bench.gpu import run as gpu
from gdn2_jax.bench.op import run as op
from gdn2_jax.bench.serve import run as serve

_COMMANDS = {
  "op": op.main,
  "gpu": gpu.main,
  "serve": serve.main,
  "pieces": pieces.main,
}


def main() -> None:
  """Runs the subcommand that the first argument names."""
  for module in (op, gpu, serve, pieces):
    module.define_flags()
    flags.adopt_module_key_flags(module)  # so that --help lists them
  command = cli.take_command(_COMMANDS, __doc__)

  def run(argv: list[str]) -> None:
    cli.refuse_positional(argv, "--spec=small")
    with cli.one_line_errors():
      _COMMANDS[command](flags.FLAGS)

  cli.run(run, __doc__)


if __name__ == "__main__":
  main()
