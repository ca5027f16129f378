"""Selection of scored validation targets, the same for models and baselines.

The validation split is one stream of tokens, cut into rows. A limit is a
number of tokens of that stream, so that rows of any length score the same
text.
"""

import math
from collections.abc import Iterator

import numpy as np

Batch = dict[str, np.ndarray]


def validation_batches(
  dataset, *, seq_len: int, batch_size: int, tokens: int | None = None
) -> Iterator[Batch]:
  """Yields validation batches in order; loss_mask is 0 beyond `tokens`."""
  sizes = {"seq_len": seq_len, "batch_size": batch_size, "tokens": tokens}
  for name, value in sizes.items():
    if value is not None and value < 1:
      raise ValueError(f"{name}={value}: expected >= 1")
  limit = math.inf if tokens is None else tokens
  shape = (batch_size, seq_len)
  first = 0
  for batch in dataset.validation_batches(seq_len, batch_size):
    if first >= limit:
      return
    assert batch["inputs"].shape == shape, batch["inputs"].shape
    index = first + np.arange(batch_size * seq_len).reshape(shape)
    mask = np.where(index < limit, batch["loss_mask"], 0)
    yield batch | {"loss_mask": mask.astype(np.float32)}
    first += batch_size * seq_len


def num_batches(
  dataset, *, seq_len: int, batch_size: int, tokens: int | None = None
) -> int:
  """Number of batches that `validation_batches` yields."""
  pairs = max(len(dataset.validation_tokens()) - 1, 0)
  pairs = pairs if tokens is None else min(pairs, tokens)
  return math.ceil(math.ceil(pairs / seq_len) / batch_size)
