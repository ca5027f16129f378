"""Command `python -m gdn2_jax.generate`; on import, the function."""

import sys

if __name__ == "__main__":
  from gdn2_jax import cli
  from gdn2_jax.inference import __main__ as command

  cli.run(command.main, command.__doc__ or "")
else:
  # Importing this module would bind it to the package's name `generate` and
  # hide the public function; so the import gives the function itself.
  from gdn2_jax.inference.generate import generate

  sys.modules[__name__] = generate  # type: ignore[assignment]
