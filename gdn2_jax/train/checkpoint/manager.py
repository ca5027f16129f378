"""Checkpointer: saves in the background, atomically; verifies what it reads.

    WORKDIR/checkpoints/STEP/params      parameters
    WORKDIR/checkpoints/STEP/optimizer   the rest of TrainState
    WORKDIR/checkpoints/STEP/meta        JSON: format, config, data, shapes,
                                         digests of all arrays

STEP counts finished steps and is also the data position. The three are
committed together by one rename; a directory without the marker file of that
commit is ignored. Orbax checks no array, so training would go on with a bit
flipped on disk; the digests find it.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from gdn2_jax.train.checkpoint.digest import digest
from gdn2_jax.train.checkpoint.load import (
  first_line,
  read_arrays,
  verify,
)
from gdn2_jax.train.checkpoint.meta import (
  FORMAT,
  CheckpointError,
  DamagedError,
  SaveError,
  check_files,
  committed_steps,
  numbered_steps,
  read_meta,
  seal,
)
from gdn2_jax.train.checkpoint.orbax_cleanup import end_orphans
from gdn2_jax.train.config import CheckpointConfig
from gdn2_jax.train.processes.join import is_lost_peer
from gdn2_jax.train.state import TrainState

_TRASH = ".trash"
_SET_ASIDE = ".set_aside"


class Checkpointer:
  """Saves and restores TrainState; every process calls every method.

  Args:
    directory: holds the numbered steps; made if missing.
    config: the policy of saving and resuming.
    say: prints a line about a save that failed, or a resume.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    config: CheckpointConfig,
    say: Callable[[str], None] = print,
  ):
    self.directory = pathlib.Path(directory).absolute()
    self.config = config
    self.say = say
    self._opened: ocp.CheckpointManager | None = None
    self._saving: int | None = None
    self._failed: list[SaveError] = []
    if jax.process_index() == 0:
      self.directory.mkdir(parents=True, exist_ok=True)
      self._empty_trash()
    _sync("checkpoint directory is there")

  @property
  def _manager(self) -> ocp.CheckpointManager:
    """Orbax's manager, opened once incomplete steps are out of its way."""
    if self._opened is None:
      # Orbax would count an incomplete step as the newest, and drop older saves
      # silently.
      present = set(numbered_steps(self.directory))
      self.set_aside(present - set(committed_steps(self.directory)))
      self._opened = ocp.CheckpointManager(
        self.directory,
        options=ocp.CheckpointManagerOptions(
          max_to_keep=self.config.keep,
          cleanup_tmp_directories=True,
          # Makes deletion a rename: a kill cannot leave half a step behind.
          todelete_subdir=_TRASH,
        ),
        item_names=("params", "optimizer", "meta"),
      )
    return self._opened

  def set_aside(self, steps: Iterable[int]) -> None:
    """Moves steps to .set_aside; nothing is deleted."""
    steps = list(steps)
    _sync("steps to set aside are known")
    if jax.process_index() == 0 and steps:
      shelf = self.directory / _SET_ASIDE
      shelf.mkdir(exist_ok=True)
      for step in steps:
        number = 0
        while (shelf / f"{step}-{number}").exists():
          number += 1
        os.rename(self.directory / str(step), shelf / f"{step}-{number}")
    _sync("steps are set aside")

  def _empty_trash(self) -> None:
    if jax.process_index() == 0:
      for path in (self.directory / _TRASH).glob("*"):
        shutil.rmtree(path, ignore_errors=True)

  def latest_step(self) -> int | None:
    """The newest complete checkpoint, or None."""
    return max(committed_steps(self.directory), default=None)

  def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
    """Copies the state off the devices, then writes it in the background.

    Waits for the save before this one. A failed save is reported, its files are
    removed, and the next one tries again.

    Raises:
      CheckpointError: the step is saved already.
      SaveError: `max_failed_saves` in a row failed, or one with several
        processes.
    """
    self._settle()
    if step in committed_steps(self.directory):
      raise CheckpointError(f"checkpoint of step {step} exists already")
    items = _items(state)
    sealed = seal(
      {**meta, "format": FORMAT, "step": step, "digests": digest(items)}
    )
    try:
      self._empty_trash()
      accepted = self._manager.save(
        step,
        args=ocp.args.Composite(
          meta=ocp.args.JsonSave(sealed),
          **{name: ocp.args.StandardSave(x) for name, x in items.items()},
        ),
        force=True,
      )
    except Exception as e:
      self._fail(step, e)
      return
    if not accepted:
      # Orbax answers False, without an error, to a step it considers old.
      raise CheckpointError(f"checkpoint of step {step} was not accepted")
    self._saving = step

  def _settle(self) -> None:
    """Waits for the save in progress and records a failure."""
    if self._saving is None:
      return
    step, self._saving = self._saving, None
    try:
      self._manager.wait_until_finished()
      if step not in committed_steps(self.directory):
        raise OSError("it was written but not committed")
    except Exception as e:
      self._fail(step, e)
    else:
      self._failed.clear()

  def _fail(self, step: int, cause: Exception) -> None:
    if is_lost_peer(cause):
      raise cause  # nothing is wrong with the disk
    most = self.config.max_failed_saves
    newest = self.latest_step()
    error = SaveError(
      f"checkpoint of step {step} could not be written "
      f"({len(self._failed) + 1} in a row, "
      f"--config.checkpoint.max_failed_saves={most}): "
      f"{first_line(cause)}; the newest complete one is "
      + (f"of step {newest}" if newest is not None else "none")
    )
    error.__cause__ = cause
    self._failed.append(error)
    if jax.process_count() > 1 or len(self._failed) >= most:
      raise error
    # A new manager knows only what is on disk. The space of the unfinished
    # files is needed for the next save.
    self._discard_manager()
    end_orphans()
    for path in self.directory.glob(f"{step}.*tmp*"):
      shutil.rmtree(path, ignore_errors=True)
    self.say(f"WARNING: {error}")

  def _discard_manager(self) -> None:
    manager, self._opened = self._opened, None
    if manager is not None:
      with contextlib.suppress(Exception):
        manager.close()

  def restore(
    self, step: int, abstract: TrainState, meta: dict[str, Any] | None = None
  ) -> TrainState:
    """The verified state of a step, with the shardings of `abstract`.

    Raises:
      DamagedError: files are missing or altered, or an array is not what was
        saved.
    """
    meta = read_meta(self.directory, step) if meta is None else meta
    folder = self.directory / str(step)
    restored, damage = None, None
    try:
      check_files(folder)
      restored = {
        name: read_arrays(folder / name, part)
        for name, part in _items(abstract).items()
      }
    except DamagedError as e:
      damage = e
    # All processes compute the digest, so they must agree to go on.
    if not _everywhere(damage is None):
      raise damage or DamagedError("another process cannot read it")
    verify(restored, meta)
    return TrainState(params=restored["params"], **restored["optimizer"])

  def reached_preemption(self, step: int) -> bool:
    """True if all processes agreed to stop at this step."""
    return self._manager.reached_preemption(step)

  def wait(self) -> None:
    """Blocks until the save in progress is committed, or raises SaveError."""
    self._settle()
    if self._failed:
      raise self._failed[-1]

  def finish(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
    """Waits for the last save of a run; repeats it once if it failed."""
    self._settle()
    if self._failed and step not in committed_steps(self.directory):
      self.save(step, state, meta)
    self.wait()

  def close(self) -> None:
    """Waits for the last save and stops the threads; may raise SaveError."""
    try:
      self.wait()
    finally:
      self._discard_manager()
      self._empty_trash()


def _items(state: TrainState) -> dict[str, Any]:
  """Items of a checkpoint; inference reads "params" alone."""
  fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
  return {"params": fields.pop("params"), "optimizer": fields}


def _sync(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def _everywhere(ok: bool) -> bool:
  """True if `ok` is true on every process."""
  if jax.process_count() == 1:
    return ok
  return bool(multihost_utils.process_allgather(ok).all())
