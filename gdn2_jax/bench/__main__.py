"""Benchmarks that check their subject before they time it.

  python -m gdn2_jax.bench op [--spec=small,large] [--json=FILE] [--peers]

Subcommands:
  op    gdn2: error, time, memory and compile time of each implementation,
        decoding against copy bandwidth, time against length.
"""

import sys

from absl import app, flags

from gdn2_jax import cli
from gdn2_jax.bench import op

_COMMANDS = {"op": op.main}


def main(argv: list[str]) -> None:
  """Runs the subcommand."""
  if len(argv) < 2 or argv[1] not in _COMMANDS:
    raise app.UsageError(
      f"expected a subcommand, one of: {', '.join(_COMMANDS)}"
    )
  cli.refuse_positional(argv[1:], "--spec=small")
  with cli.one_line_errors():
    _COMMANDS[argv[1]](flags.FLAGS)


if __name__ == "__main__":
  op.define_flags()
  cli.run(main, sys.modules["__main__"].__doc__ or "")
