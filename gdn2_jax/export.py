"""Entry point of `python -m gdn2_jax.export`; see interop/export."""

from gdn2_jax import cli
from gdn2_jax.interop.export import __main__ as command

if __name__ == "__main__":
  cli.run(command.main, command.__doc__ or "")
