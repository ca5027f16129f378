"""The Gated DeltaNet-2 recurrence: one op, several implementations."""

from gdn2_jax.ops.gdn2.api import gdn2, gdn2_step
from gdn2_jax.ops.gdn2.dispatch import (
  IMPLEMENTATIONS,
  Implementation,
  select_implementation,
  unsupported_reason,
)

__all__ = [
  "IMPLEMENTATIONS",
  "Implementation",
  "gdn2",
  "gdn2_step",
  "select_implementation",
  "unsupported_reason",
]
