"""Entry point of `python -m gdn2_jax.convert`; see interop/convert."""

if __name__ == "__main__":
  from gdn2_jax import cli
  from gdn2_jax.interop.convert import __main__ as command

  cli.run(command.main, command.__doc__ or "")
