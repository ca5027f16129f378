"""CheckpointConfig, apart from the code so that configs stay light."""

import dataclasses


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class CheckpointConfig:
  """When to save, how many to keep, what a resume may change.

  Attributes:
    every_steps: save each so many steps; 0 = only at the end of the run or
      when it is asked to stop.
    keep: newest checkpoints kept; older ones are deleted.
    allow_data_change: resume although the data or its order differs from what
      the checkpoint was trained on.
  """

  every_steps: int = 1000
  keep: int = 3
  allow_data_change: bool = False
