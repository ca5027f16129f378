"""Evaluates trained models; each evaluation is a command with its own --help.

  python -m gdn2_jax.eval loss --workdir=runs/tiny       loss on held-out text
  python -m gdn2_jax.eval synthetic --task=overwrite     memory tasks, trained
  python -m gdn2_jax.eval ruler --workdir=runs/tiny      needles in haystacks
  python -m gdn2_jax.eval harness --tasks=... --workdir=...  lm-eval's tasks
  python -m gdn2_jax.eval recall --data=... --workdir=...    answers in texts
  python -m gdn2_jax.eval table --results=... --layout=4     beside the paper

Without a command it is `loss`. --workdir is a training run; --model, a folder
with a published or converted model, can stand in its place.
"""

import importlib

from gdn2_jax import cli

# Each is a package of gdn2_jax.eval with a __main__ that can be run as well.
COMMANDS = ("loss", "synthetic", "ruler", "harness", "recall", "table")


def main() -> None:
  """Runs the command that the first argument names."""
  command = cli.take_command(COMMANDS, __doc__, default="loss")
  module = importlib.import_module(f"gdn2_jax.eval.{command}.__main__")
  cli.run(module.main, module.__doc__ or "")


if __name__ == "__main__":
  main()
