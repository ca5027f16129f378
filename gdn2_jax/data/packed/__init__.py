"""Packed folders: tokens and document borders, read as rows."""

from gdn2_jax.data.packed.folder import Packed, open_packed
from gdn2_jax.data.packed.rows import make_row

__all__ = [
  "Packed",
  "make_row",
  "open_packed",
]
