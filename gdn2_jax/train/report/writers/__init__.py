"""Writers of the metrics of a run: metrics.jsonl, TensorBoard, W&B, others."""

from gdn2_jax.train.report.writers.choose import (
  ReportConfig,
  check_writers,
  open_writers,
)
from gdn2_jax.train.report.writers.protocol import Writer

__all__ = ["ReportConfig", "Writer", "check_writers", "open_writers"]
