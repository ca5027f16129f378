"""Entry point of `python -m gdn2_jax.generate`; imported, the function."""

import sys

if __name__ == "__main__":
  from gdn2_jax import cli
  from gdn2_jax.inference import __main__ as command

  cli.run(command.main, command.__doc__ or "")
else:
  # `import gdn2_jax.generate` binds what is in sys.modules to the package: the
  # public function, so that no import order hides it behind this module.
  from gdn2_jax.inference.generate import generate

  sys.modules[__name__] = generate  # type: ignore[assignment]
