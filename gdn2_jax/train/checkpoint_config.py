"""CheckpointConfig, apart from the code so that configs stay light."""

from gdn2_jax.config_class import config_class


@config_class
class CheckpointConfig:
  """When to save, how many to keep, what a resume may change.

  Attributes:
    every_steps: save each so many steps; 0 = only at the end of the run or
      when it is asked to stop.
    keep: newest checkpoints kept; older ones are deleted. With 1 there is
      nothing to fall back on if that one is damaged later.
    max_failed_saves: saves that may fail in a row; the last of them ends the
      run. Failed ones are reported and training goes on.
    restore_step: resume from exactly this step, or fail; newer checkpoints
      are moved to checkpoints/.set_aside. 0 = from the newest good one.
    allow_data_change: resume although the data or its order differs from what
      the checkpoint was trained on.
    allow_fresh_start: start from step 0 although there are checkpoints, if
      none of them is usable.
  """

  every_steps: int = 1000
  keep: int = 3
  max_failed_saves: int = 3
  restore_step: int = 0
  allow_data_change: bool = False
  allow_fresh_start: bool = False
