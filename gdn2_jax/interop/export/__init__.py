"""Export of prefill and decode as programs that need JAX alone."""

from gdn2_jax.interop.export.program import export_programs

__all__ = ["export_programs"]
