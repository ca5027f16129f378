"""Weights under the names of other programs: there, back and across.

`python -m gdn2_jax.convert --help` says what it takes.
"""

from gdn2_jax.interop.convert.options import Options
from gdn2_jax.interop.convert.report import Report
from gdn2_jax.interop.convert.run import convert

__all__ = ["Options", "Report", "convert"]
