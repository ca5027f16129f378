"""Means of the metrics over the steps between two rows of metrics.jsonl."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass
class Interval:
  """Sums over the steps since the last row whose update was made.

  A checkpoint stores them, so that a resumed run writes the same rows.

  Attributes:
    steps: number of these steps.
    tokens: sum of the targets that counted.
    nats: sum of the losses, each times its targets.
    grad_norm: sum of the gradient norms.
  """

  steps: float = 0.0
  tokens: float = 0.0
  nats: float = 0.0
  grad_norm: float = 0.0

  @classmethod
  def of_checkpoint(cls, meta: Mapping[str, Any]) -> "Interval":
    """Sums in the meta data of a checkpoint; zeros if it has none."""
    saved = meta.get("interval")
    names = {field.name for field in dataclasses.fields(cls)}
    ok = isinstance(saved, dict) and saved.keys() == names
    ok = ok and all(
      isinstance(x, float) and math.isfinite(x) for x in saved.values()
    )
    return cls(**saved) if ok else cls()

  def add(self, metrics: Mapping[str, float]) -> None:
    """Adds the metrics of a step."""
    self.steps += 1
    self.tokens += metrics["tokens"]
    self.nats += metrics["loss"] * metrics["tokens"]
    self.grad_norm += metrics["grad_norm"]

  def take(self, last: Mapping[str, float]) -> dict[str, float]:
    """Metrics of the last step with means in their place; starts anew.

    The loss is that of all targets of the interval, grad_norm and tokens are
    means over its steps. If every update was skipped, the last step remains.
    """
    row = dict(last)
    if self.tokens:
      row["loss"] = self.nats / self.tokens
    if self.steps:
      row["grad_norm"] = self.grad_norm / self.steps
      row["tokens"] = self.tokens / self.steps
    self.steps = self.tokens = self.nats = self.grad_norm = 0.0
    return row
