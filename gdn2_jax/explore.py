"""Command `gdn2 explore`: page of gates and states over a text."""

if __name__ == "__main__":
  from gdn2_jax import cli
  from gdn2_jax.explorer import __main__ as command

  cli.run(command.main, command.__doc__ or "")
