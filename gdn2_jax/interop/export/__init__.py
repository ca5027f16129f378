"""Trained models as folders: for this library, or for JAX alone."""

from gdn2_jax.interop.export.program import export_programs

__all__ = ["export_programs"]
