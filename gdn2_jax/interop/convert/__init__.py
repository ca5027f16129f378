"""Conversion of weights between the names and layouts of programs."""

from gdn2_jax.interop.convert.options import Options
from gdn2_jax.interop.convert.report import Report
from gdn2_jax.interop.convert.run import convert

__all__ = ["Options", "Report", "convert"]
