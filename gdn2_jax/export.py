"""Entry point of `python -m gdn2_jax.export`; see interop/export."""

if __name__ == "__main__":
  from gdn2_jax import cli
  from gdn2_jax.interop.export import __main__ as command

  cli.run(command.main, command.__doc__ or "")
