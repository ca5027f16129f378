"""Checkpoints: written in the background, atomic, verified when read.

    WORKDIR/checkpoints/STEP/params      parameters
    WORKDIR/checkpoints/STEP/optimizer   the rest of TrainState
    WORKDIR/checkpoints/STEP/meta        JSON: format, config, data, shapes,
                                         digests of all arrays

STEP counts finished steps and is also the data position. The three are
committed together by one rename; a directory without the marker file of that
commit does not exist for us, whatever its name. Orbax checks no array: a
flipped bit on disk would train on. The digests see it.
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
  is_step,
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
    config: how many to keep, how many failures to survive.
    warn: prints a line about a save that failed.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    config: CheckpointConfig,
    warn: Callable[[str], None] = print,
  ):
    self.directory = pathlib.Path(directory).absolute()
    self._config = config
    self._warn = warn
    self._opened: ocp.CheckpointManager | None = None
    self._saving: int | None = None
    self._failed: list[SaveError] = []
    if jax.process_index() == 0:
      self.directory.mkdir(parents=True, exist_ok=True)
      self._empty_trash()
    _sync("checkpoint directory is there")

  @property
  def _manager(self) -> ocp.CheckpointManager:
    """Opened on first use: what is not ours must be out of the way by then."""
    if self._opened is None:
      # Orbax would count an incomplete step as the newest and refuse older
      # saves without a word.
      committed = set(committed_steps(self.directory))
      self.set_aside(
        int(path.name)
        for path in self.directory.iterdir()
        if is_step(path) and int(path.name) not in committed
      )
      self._opened = ocp.CheckpointManager(
        self.directory,
        options=ocp.CheckpointManagerOptions(
          max_to_keep=self._config.keep,
          cleanup_tmp_directories=True,
          # Makes deletion a rename: a kill cannot leave half a step behind.
          todelete_subdir=_TRASH,
        ),
        item_names=("params", "optimizer", "meta"),
      )
    return self._opened

  def set_aside(self, steps: Iterable[int]) -> None:
    """Moves steps out of the way; nothing is deleted."""
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
    """Copies the state off the devices, then writes in the background.

    Waits for the save before this one. A save that failed is reported, its
    files are removed, and the next one tries again.

    Raises:
      CheckpointError: the step is saved already.
      SaveError: as many saves in a row failed as the config allows, or one of
        a run of several processes.
    """
    self._settle()
    if step in committed_steps(self.directory):
      raise CheckpointError(f"checkpoint of step {step} exists already")
    items = _items(state)
    sealed = seal({**meta, "format": FORMAT, "step": step} | _digests(items))
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
    """Waits for the save in progress and takes note of how it ended."""
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
    most = self._config.max_failed_saves
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
    # A new manager knows only what is on disk, and gives the space of the
    # unfinished files back.
    self._discard_manager()
    end_orphans()
    for path in self.directory.glob(f"{step}.*tmp*"):
      shutil.rmtree(path, ignore_errors=True)
    self._warn(f"WARNING: {error}")

  def _discard_manager(self) -> None:
    manager, self._opened = self._opened, None
    if manager is not None:
      with contextlib.suppress(Exception):
        manager.close()

  def restore(
    self, step: int, abstract: TrainState, meta: dict[str, Any] | None = None
  ) -> TrainState:
    """The state of a step, placed as `abstract` says, after `check_meta`.

    Args:
      step: step of a complete checkpoint.
      abstract: shapes, dtypes and shardings of all leaves.
      meta: its meta data, if it was read before.

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
    # The digest takes all processes, so they have to agree before.
    if not _everywhere(damage is None):
      raise damage or DamagedError("another process cannot read it")
    verify(restored, meta)
    return TrainState(params=restored["params"], **restored["optimizer"])

  def reached_preemption(self, step: int) -> bool:
    """Whether all of several processes agreed to stop at this step."""
    return self._manager.reached_preemption(step)

  def wait(self) -> None:
    """Blocks until the save in progress is committed, or raises SaveError."""
    self._settle()
    if self._failed:
      raise self._failed[-1]

  def finish(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
    """Waits for the last save of a run, and tries once more if it failed."""
    self._settle()
    if self._failed and step not in committed_steps(self.directory):
      self.save(step, state, meta)
    self.wait()

  def close(self) -> None:
    """Waits for the last save, raises if it failed, and stops the threads."""
    try:
      self.wait()
    finally:
      self._discard_manager()
      self._empty_trash()


def _items(state: TrainState) -> dict[str, Any]:
  """Items of a checkpoint: inference reads params alone."""
  optimizer = {
    field.name: getattr(state, field.name)
    for field in dataclasses.fields(state)
    if field.name != "params"
  }
  return {"params": state.params, "optimizer": optimizer}


def _digests(items: dict[str, Any]) -> dict[str, Any]:
  return {"digests": digest(items)}


def _sync(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def _everywhere(ok: bool) -> bool:
  """Whether `ok` holds on every process."""
  if jax.process_count() == 1:
    return ok
  return bool(multihost_utils.process_allgather(ok).all())
