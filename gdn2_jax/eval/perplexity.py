"""Held-out loss of a language model, at the training length and beyond."""

import dataclasses


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class EvalConfig:
  """How much to evaluate, and when.

  Attributes:
    every_steps: evaluate each so many training steps; 0 = only at the end.
    batches: batches of the 1x length that one evaluation scores.
    batch_size: rows of a batch at the 1x length.
    length_multiples: row lengths, as multiples of the training length.
  """

  every_steps: int = 0
  batches: int = 16
  batch_size: int = 8
  length_multiples: tuple[int, ...] = (1, 2, 4)
