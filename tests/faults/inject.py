"""The training command, with one thing made to go wrong.

  python -m tests.faults.inject nan=3 nan=4 -- --config=... --workdir=...

Everything after -- goes to `python -m gdn2_jax.train`, which then runs in this
process. Steps count from 0, saves from 1, over the life of this process.

  nan=STEP           the loss of this step is NaN
  stuck=STEP         the batch of this step never comes
  slow_save=SECONDS  every commit of a checkpoint takes so long
  full_disk=SAVE     this save and all later ones fail at their commit
  die_at_commit=SAVE         kill -9 right before the rename that commits
  die_after_commit=SAVE      kill -9 right after it
  die_at_retention=COUNT     kill -9 right before an old step is removed
  die_after_retention=COUNT  kill -9 when its directory has just been renamed
  die_in_trash=COUNT         kill -9 with the removed step half deleted
"""

import errno
import functools
import os
import pathlib
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from gdn2_jax.train import loop

Batch = dict[str, np.ndarray]


class _Altered:
  """A dataset whose batches of some steps pass through a function first."""

  def __init__(self, dataset: Any, changes: dict[int, Callable]):
    self._dataset = dataset
    self._changes = changes

  def __getattr__(self, name: str) -> Any:
    return getattr(self._dataset, name)

  def train_batches(self, start_step: int = 0, **hosts) -> Iterator[Batch]:
    batches = self._dataset.train_batches(start_step=start_step, **hosts)
    for step, batch in enumerate(batches, start_step):
      change = self._changes.get(step)
      yield batch if change is None else change(batch)


def _poison(batch: Batch) -> Batch:
  mask = batch["loss_mask"].copy()
  mask[0, 0] = np.nan
  return batch | {"loss_mask": mask}


def _hang(batch: Batch) -> Batch:
  print(f"stuck at {time.time()}", file=sys.stderr, flush=True)
  while True:
    time.sleep(3600)


def _die() -> None:
  os.kill(os.getpid(), signal.SIGKILL)


class _Renames:
  """Stands in front of the renames that commit and remove checkpoints."""

  def __init__(self, faults: dict[str, list[str]]):
    self._faults = faults
    self._commits = 0
    self._removals = 0
    self._rmtree = shutil.rmtree

  def install(self) -> None:
    os.rename = functools.partial(self.rename, os.rename)
    os.replace = functools.partial(self.rename, os.replace)
    shutil.rmtree = self.rmtree

  def _at(self, fault: str, count: int) -> bool:
    return any(count == int(value) for value in self._faults.get(fault, []))

  def rename(
    self, real: Callable[..., None], source: Any, target: Any, **kwargs
  ) -> None:
    source, target = pathlib.Path(source), pathlib.Path(target)
    commits = target.name.isdigit() and "checkpoint-tmp" in source.name
    removes = source.name.isdigit() and target.parent.name == ".trash"
    self._commits += commits
    self._removals += removes
    if commits:
      for seconds in self._faults.get("slow_save", []):
        print(f"saving {target.name}", file=sys.stderr, flush=True)
        time.sleep(float(seconds))
      for first in self._faults.get("full_disk", []):
        if self._commits >= int(first):
          raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
      if self._at("die_at_commit", self._commits):
        _die()
    if removes and self._at("die_at_retention", self._removals):
      _die()
    real(source, target, **kwargs)
    if commits and self._at("die_after_commit", self._commits):
      _die()
    if removes and self._at("die_after_retention", self._removals):
      _die()

  def rmtree(self, path: Any, *args, **kwargs) -> None:
    removed = pathlib.Path(path).parent.name == ".trash"
    # A save may have removed several steps at once.
    counts = [int(value) for value in self._faults.get("die_in_trash", [])]
    if removed and any(self._removals >= count for count in counts):
      files = [p for p in pathlib.Path(path).rglob("*") if p.is_file()]
      for file in files[: len(files) // 2]:
        file.unlink()
      _die()
    self._rmtree(path, *args, **kwargs)


def install(faults: dict[str, list[str]]) -> None:
  """Makes the faults happen in this process.

  Args:
    faults: {name: values}, as on the command line.
  """
  changes = {int(step): _poison for step in faults.get("nan", [])}
  changes |= {int(step): _hang for step in faults.get("stuck", [])}
  if changes:
    open_dataset = loop.open_dataset
    loop.open_dataset = lambda config: _Altered(open_dataset(config), changes)
    # It would refuse what is poisoned here.
    loop.check_batch = lambda *_: None
  _Renames(faults).install()


def main() -> None:
  """Entry point; see the module's text."""
  border = sys.argv.index("--")
  faults: dict[str, list[str]] = {}
  for argument in sys.argv[1:border]:
    name, _, value = argument.partition("=")
    if f"  {name}=" not in (__doc__ or ""):
      sys.exit(f"error: {name!r}: no such fault\n{__doc__}")
    faults.setdefault(name, []).append(value)
  install(faults)
  sys.argv = [sys.argv[0], *sys.argv[border + 1 :]]
  runpy.run_module(
    "gdn2_jax.train.__main__", run_name="__main__", alter_sys=True
  )


if __name__ == "__main__":
  main()
