"""Choice of the checkpoint that a run starts from.

The policy, so that relaunching the same command always does the right thing:
 1. The newest complete and undamaged checkpoint of the workdir wins. Damaged
    ones are passed over with a warning and moved to checkpoints/.set_aside.
 2. It must hold the same architecture, shapes and dtypes, and come from the
    same data in the same order; else the run is refused, never restarted.
 3. Other fields (learning rate, steps, mesh, microbatches) may change; the
    changes are printed.
 4. checkpoint.restore_step names one step: that one or none.
 5. Without any checkpoint the run starts from the seed. If there are some and
    none is usable it is refused, unless checkpoint.allow_fresh_start is set.
"""

from typing import Any

import jax

from gdn2_jax.train.checkpoint.manager import Checkpointer
from gdn2_jax.train.checkpoint.meta import (
  CheckpointError,
  DamagedError,
  check_meta,
  committed_steps,
  numbered_steps,
  read_meta,
)
from gdn2_jax.train.config import differences
from gdn2_jax.train.state import TrainState


def resume(
  checkpointer: Checkpointer, abstract: TrainState, meta: dict[str, Any]
) -> tuple[TrainState, dict[str, Any]] | None:
  """The state to go on from and its meta data; None to start from the seed.

  Raises:
    CheckpointError: the run must not start, see above; nothing was moved.
  """
  config, say = checkpointer.config, checkpointer.say
  directory = checkpointer.directory
  present, complete = numbered_steps(directory), committed_steps(directory)
  candidates = complete[::-1]
  if config.restore_step:
    candidates = [config.restore_step]
    if config.restore_step not in complete:
      raise CheckpointError(
        f"--config.checkpoint.restore_step={config.restore_step}: no such "
        f"checkpoint; have {', '.join(map(str, complete)) or 'none'}"
      )
  damage = {
    step: DamagedError("incomplete") for step in set(present) - set(complete)
  }
  for step in candidates:
    try:
      saved = read_meta(directory, step)
      check_meta(saved, meta, allow_data_change=config.allow_data_change)
      state = checkpointer.restore(step, abstract, saved)
      if int(jax.device_get(state.step)) != step:
        raise DamagedError("it holds the state of another step")
    except DamagedError as e:
      if config.restore_step:
        raise DamagedError(
          f"--config.checkpoint.restore_step={step}: {e}"
        ) from e
      damage[step] = e
      continue
    for older in sorted(damage, reverse=True):
      say(
        "WARNING: damaged checkpoint passed over: step "
        f"{older}: {damage[older]}"
      )
    checkpointer.set_aside(s for s in present if s > step or s in damage)
    for line in differences(saved["config"], meta["config"], "--config"):
      say(f"changed since the checkpoint: {line}")
    say(f"resumed from step {step}")
    return state, saved
  if damage:
    _refuse_or_set_aside(checkpointer, damage)
  return None


def _refuse_or_set_aside(
  checkpointer: Checkpointer, damage: dict[int, DamagedError]
) -> None:
  """Starts from the seed beside damaged checkpoints only where allowed."""
  reasons = [f"step {s}: {damage[s]}" for s in sorted(damage, reverse=True)]
  if not checkpointer.config.allow_fresh_start:
    raise CheckpointError(
      f"{checkpointer.directory}: no checkpoint is usable:\n  "
      + "\n  ".join(reasons)
      + "\npass --config.checkpoint.allow_fresh_start to move them to "
      ".set_aside and start from step 0"
    )
  for reason in reasons:
    checkpointer.say(f"WARNING: damaged checkpoint: {reason}")
  checkpointer.say(
    "WARNING: starting from step 0 (--config.checkpoint.allow_fresh_start)"
  )
  checkpointer.set_aside(damage)
