"""Names and layouts of parameters in torch, for every mixer of the package.

The names are ours below `model.`, with `weight` for `kernel`, `table` and a
convolution's taps; the head is `lm_head.weight`.
"""

from gdn2_jax.interop.layouts import Conv, Flat, Layout, Linear
from gdn2_jax.interop.names import Move
from gdn2_jax.interop.tree import param_specs
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.mixers.registry import kind_of

LETTERS = ("G", "K", "D", "E", "M", "N", "S", "A")


def check_letters(config: ModelConfig) -> None:
  """Raises ValueError for a mixer that the code in torch has not."""
  for letter in config.pattern:
    if letter not in LETTERS:
      names = ", ".join(f"{x} ({kind_of(x).name})" for x in LETTERS)
      raise ValueError(
        f"pattern={config.pattern!r}: the dialect 'hf' has no mixer "
        f"{letter!r} ({kind_of(letter).name}), expected letters among {names}"
      )


def moves(config: ModelConfig) -> list[Move]:
  """A move for every parameter of a model."""
  check_letters(config)
  found = []
  for name in param_specs(config):
    theirs, layout = _place(name)
    found.append(Move((name,), theirs, layout))
  return found


def _place(name: str) -> tuple[str, Layout]:
  """Name of theirs, and its layout."""
  owner, _, last = name.rpartition(".")
  if name == "head":
    return "lm_head.weight", Linear()
  if name == "embedding.table":
    return "model.embedding.weight", Layout()
  if last == "kernel":
    # Output projections of mixers read heads and their channels.
    in_axes = 2 if owner.endswith("mixer.o_proj") else 1
    return f"model.{owner}.weight", Linear(in_axes)
  if last.endswith("_conv"):
    return f"model.{name}.weight", Conv()
  if last.endswith("_conv_bias"):
    return f"model.{name.removesuffix('_bias')}.bias", Flat()
  return f"model.{name}", Flat() if last == "bias" else Layout()
