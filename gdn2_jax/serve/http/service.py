"""Model, worker and limits that all routes share."""

import dataclasses
import time
from typing import Any

from gdn2_jax.serve.conversation import Sessions
from gdn2_jax.serve.http.guard import Guard
from gdn2_jax.serve.limits import Limits
from gdn2_jax.serve.metrics import Metrics
from gdn2_jax.serve.worker import Worker


@dataclasses.dataclass
class Service:
  """All that routes need.

  Attributes:
    answers: answers that run or wait, those of clients that left included
      until their rows are free.
    guard: set by `make_app`.
  """

  model_name: str
  tokenizer: Any
  worker: Worker
  limits: Limits
  metrics: Metrics
  sessions: Sessions
  answers: int = 0
  guard: Guard | None = None
  started: int = dataclasses.field(default_factory=lambda: int(time.time()))
