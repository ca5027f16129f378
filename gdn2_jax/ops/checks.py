"""Checks of array arguments, shared by the ops."""

from typing import Any

import jax.numpy as jnp


def check_floating(name: str, x: Any, axes: str) -> None:
  """Raises ValueError unless x is floating-point with axes such as "[B, T]"."""
  rank = axes.count(",") + 1
  if x.ndim != rank or not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(
      f"{name}: expected floating {axes}, got {x.dtype} of shape {x.shape}"
    )


def check_integers(
  name: str, x: Any, axes: str, shape: tuple[Any, ...]
) -> None:
  """Raises ValueError unless x has integers and that shape."""
  if x.shape != shape or not jnp.issubdtype(x.dtype, jnp.integer):
    raise ValueError(
      f"{name}: expected integers {axes} = {shape}, got {x.dtype} of shape "
      f"{x.shape}"
    )
