"""Builds of packed folders from text, in parallel and resumable."""

from gdn2_jax.data.build.build import build_rows

__all__ = [
  "build_rows",
]
