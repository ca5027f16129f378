"""Damaged checkpoint files, full disks and failing saves."""

import contextlib
import dataclasses
import os
import pathlib
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

from gdn2_jax.config_json import from_json
from gdn2_jax.model.lm import LM
from gdn2_jax.sharding import make_mesh, use_mesh
from gdn2_jax.train.checkpoint.digest import digest
from gdn2_jax.train.checkpoint.manager import Checkpointer
from gdn2_jax.train.checkpoint.meta import (
  CheckpointError,
  committed_steps,
  make_meta,
  read_meta,
)
from gdn2_jax.train.checkpoint.resume import resume
from gdn2_jax.train.config import (
  CheckpointConfig,
  TrainConfig,
)
from gdn2_jax.train.state import TrainState, plan_state
from tests.faults.lab import Lab, newest, total
from tests.faults.outcome import Outcome, Try, tries

_DISK_MB = 6

Damage = Callable[[pathlib.Path, random.Random], object]


def flip_bit(path: pathlib.Path, chance: random.Random) -> None:
  """One bit, anywhere in the file."""
  data = bytearray(path.read_bytes())
  data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
  path.write_bytes(data)


def truncate(path: pathlib.Path, chance: random.Random) -> None:
  """All from some byte on."""
  size = path.stat().st_size
  with open(path, "r+b") as file:
    file.truncate(chance.randrange(size))


def empty(path: pathlib.Path, chance: random.Random) -> None:
  """Everything in the file."""
  path.write_bytes(b"")


def zero_page(path: pathlib.Path, chance: random.Random) -> None:
  """Up to 4 KiB become zeros, as after a lost write."""
  data = bytearray(path.read_bytes())
  start = chance.randrange(len(data))
  page = data[start : start + 4096]
  data[start : start + len(page)] = bytes(len(page))
  path.write_bytes(data)


def delete(path: pathlib.Path, chance: random.Random) -> None:
  """The file itself."""
  path.unlink()


def kind_of(path: pathlib.Path, step_dir: pathlib.Path) -> str:
  """Files of a checkpoint that play the same part: their path, less hashes."""
  parts = path.relative_to(step_dir).parts
  return "/".join("*" if len(part) == 32 else part for part in parts)


def files_by_kind(step_dir: pathlib.Path) -> dict[str, list[pathlib.Path]]:
  """All files of a checkpoint, grouped by the part they play."""
  kinds: dict[str, list[pathlib.Path]] = {}
  for path in sorted(step_dir.rglob("*")):
    if path.is_file():
      kinds.setdefault(kind_of(path, step_dir), []).append(path)
  return kinds


@dataclasses.dataclass(frozen=True)
class Restorer:
  """Restores as the training command does, in this process.

  Attributes:
    abstract: the state, with shardings.
    meta: what the run would write.
  """

  abstract: TrainState
  meta: dict[str, Any]

  def __call__(self, workdir: pathlib.Path) -> tuple[int, str, list[str]]:
    """Step restored (0: from the seed), digest of what came, lines printed.

    Raises:
      CheckpointError: the run would be refused.
    """
    lines: list[str] = []
    checkpointer = Checkpointer(
      workdir / "checkpoints", CheckpointConfig(), lines.append
    )
    found = resume(checkpointer, self.abstract, self.meta)
    checkpointer.close()
    if found is None:
      return 0, "", lines
    state, saved = found
    optimizer = {
      field.name: getattr(state, field.name)
      for field in dataclasses.fields(state)
      if field.name != "params"
    }
    digests = digest({"params": state.params, "optimizer": optimizer})
    return saved["step"], total(digests), lines


def restorer(config: TrainConfig, workdir: pathlib.Path) -> Restorer:
  """Of runs like the one in `workdir`; call it under `use_mesh`."""
  mesh = make_mesh(config.mesh)
  plan = plan_state(LM(config.model), config.optimizer, config.num_steps, mesh)
  directory = workdir / "checkpoints"
  saved = read_meta(directory, committed_steps(directory)[-1])
  fingerprint = saved["data_fingerprint"]
  meta = make_meta(config, fingerprint, {}, plan.abstract)
  return Restorer(plan.abstract, meta)


def damage_tries(
  one: Try,
  restore: Restorer,
  workdir: pathlib.Path,
  truth: dict[int, str],
  newest_step: int,
) -> str:
  """Restores from a damaged workdir and judges what came.

  Returns:
    "harmless" (the damaged step, bit for bit), "fell back" or "refused".
  """
  try:
    step, found, lines = restore(workdir)
  except CheckpointError:
    # Never for one bad step among good ones.
    one.expect(False, "refused although older steps are good")
    return "refused"
  one.silent([] if found == truth.get(step) else [step])
  if step == newest_step:
    return "harmless"
  one.expect(step == max(s for s in truth if s < newest_step), f"step {step}")
  one.expect(any("WARNING" in line for line in lines), "no warning")
  return "fell back"


def _damaged(
  lab: Lab,
  outcome: Outcome,
  count: int,
  tick: Callable[[], object],
  damages: list[Damage],
  kinds_with: str = "",
) -> Outcome:
  """Damage to the newer of two checkpoints, restored in this process."""
  chance = random.Random(2)
  older, newer = sorted(lab.digests)[-2:]
  truth = {step: lab.digests[step] for step in (older, newer)}
  config = from_json(TrainConfig, (lab.straight / "config.json").read_text())
  with use_mesh(make_mesh(config.mesh)):
    restore = restorer(config, lab.straight)
    for number, one in enumerate(tries(outcome, count, tick)):
      workdir = lab.workdir("damage", [older, newer], programs=False)
      kinds = files_by_kind(workdir / "checkpoints" / str(newer))
      # Every kind of file in turn.
      kinds = {k: v for k, v in kinds.items() if kinds_with in k}
      kind = sorted(kinds)[number % len(kinds)]
      path = chance.choice(kinds[kind])
      damages[number // len(kinds) % len(damages)](path, chance)
      ending = damage_tries(one, restore, workdir, truth, newer)
      outcome.notes[ending] = outcome.notes.get(ending, 0) + 1
      shutil.rmtree(workdir)
  outcome.notes["kinds of files"] = len(kinds)
  return outcome


def bit_flips(
  lab: Lab, count: int, tick: Callable[[], object], kinds_with: str = ""
) -> Outcome:
  """One flipped bit in the newest checkpoint, every kind of file (F7).

  Args:
    lab: with an uninterrupted run.
    count: of tries.
    tick: called after each.
    kinds_with: only files with this in their path.
  """
  outcome = Outcome("flipped bit")
  return _damaged(lab, outcome, count, tick, [flip_bit], kinds_with)


def cut_files(lab: Lab, count: int, tick: Callable[[], object]) -> Outcome:
  """Truncated, emptied, deleted and zeroed files (F8)."""
  return _damaged(
    lab,
    Outcome("cut, emptied, deleted, zeroed"),
    count,
    tick,
    [truncate, delete, empty, zero_page],
  )


def _ruins(directory: pathlib.Path, step: int) -> Iterator[str]:
  """Ways in which whole checkpoints are broken; each is undone by the next."""
  whole = directory / str(step)
  (directory / "99999").mkdir()
  yield "empty directory of a later step"
  shutil.copytree(whole, directory / "88888")
  yield "copy of a step under another number"
  for name in ("optimizer", "meta"):
    shutil.rmtree(whole / name)
    yield f"half-deleted step, no {name}"


def broken_steps(lab: Lab, count: int, tick: Callable[[], object]) -> Outcome:
  """Broken directories through the real command, then all of them (F8, F9)."""
  outcome = Outcome("broken steps, real command")
  sparse = "--config.checkpoint.every_steps=0"
  for one in tries(outcome, count, tick):
    workdir = lab.workdir("broken", [10, 20])
    directory = workdir / "checkpoints"
    for what in _ruins(directory, 20):
      good = 10 if "half" in what else 20
      child = lab.start(workdir, sparse, "--config.num_steps=400")
      child.wait_for_text("resumed from")
      child.kill()
      one.lost(max(good - child.resumed_from, 0))
      one.expect("WARNING: damaged" in child.output, f"{what}: no warning")
      if good == 10:
        # What was moved away is put back for the next way to break it.
        shutil.rmtree(directory / "20", ignore_errors=True)
        shutil.copytree(lab.straight / "checkpoints" / "20", directory / "20")
    for step in committed_steps(directory):
      shutil.rmtree(directory / str(step) / "params")
    child = lab.start(workdir, sparse)
    one.expect(child.end() == 1, f"all broken: {child.output[-500:]}")
    one.expect("allow_fresh_start" in child.output, child.output[-500:])
    child = lab.start(workdir, sparse, "--config.checkpoint.allow_fresh_start")
    child.wait_for_step(1)
    child.send(signal.SIGTERM)
    one.expect(child.end() == 0 and newest(workdir) > 0, child.output[-500:])
    one.silent(lab.wrong_steps(workdir))
  return outcome


@contextlib.contextmanager
def small_disk(path: pathlib.Path) -> Iterator[bool]:
  """Mounts a few megabytes of memory there, if this machine lets us."""
  path.mkdir()
  done = subprocess.run(
    ["mount", "-t", "tmpfs", "-o", f"size={_DISK_MB}m", "tmpfs", str(path)],
    capture_output=True,
    check=False,
  )
  try:
    yield done.returncode == 0
  finally:
    if done.returncode == 0:
      subprocess.run(["umount", "--lazy", str(path)], check=False)


def disk_full(lab: Lab, count: int, tick: Callable[[], object]) -> Outcome:
  """Checkpoints fill the disk, the run ends, and goes on when it can (F14).

  On a disk of its own where this machine allows that, else with an error
  where the commit would be.
  """
  outcome = Outcome("disk full")
  for number, one in enumerate(tries(outcome, count, tick)):
    workdir = lab.workdir("full", [10])
    directory, disk = workdir / "checkpoints", lab.folder / f"disk-{number}"
    with small_disk(disk) as real:
      outcome.notes["disk"] = "tmpfs" if real else "simulated"
      faults = [] if real else ["full_disk=4"]
      if real:
        shutil.move(directory, disk / "checkpoints")
        directory.symlink_to(disk / "checkpoints")
      child = lab.start(workdir, "--config.checkpoint.keep=1000", faults=faults)
      code, output = child.end(), child.output
      one.expect(code == 1, f"exit code {code}: {output[-500:]}")
      one.expect(
        output.count("could not be written") == 3
        and "error: checkpoint of step" in output,
        f"not reported: {output[-500:]}",
      )
      one.expect("Traceback" not in output[-300:], output[-500:])
      committed = newest(workdir)
      one.expect(committed > 10, f"newest is {committed}")
      # Somebody makes room.
      shutil.rmtree(directory / "10")
      child = lab.start(workdir, "--config.checkpoint.keep=2")
      child.wait_for_step(committed + 3)
      child.send(signal.SIGTERM)
      one.expect(child.end() == 0, child.output[-500:])
      one.lost(max(committed - child.resumed_from, 0))
      tmp = [name for name in os.listdir(directory) if "tmp" in name]
      one.expect(not tmp, f"space not given back: {tmp}")
      one.silent(lab.wrong_steps(workdir))
  return outcome


def failed_last_save(
  lab: Lab, count: int, tick: Callable[[], object]
) -> Outcome:
  """The save that SIGTERM asks for fails: not exit 0, not the newest (F16)."""
  outcome = Outcome("last save fails")
  for one in tries(outcome, count, tick):
    workdir = lab.workdir("last", [10])
    child = lab.start(
      workdir, "--config.checkpoint.every_steps=0", faults=["full_disk=1"]
    )
    child.wait_for_step(12)
    child.send(signal.SIGTERM)
    code = child.end()
    one.expect(code == 1, f"exit code {code}: {child.output[-500:]}")
    one.expect("error: checkpoint of step" in child.output, "not reported")
    one.lost(0 if newest(workdir) == 10 else 1)
    one.silent(lab.wrong_steps(workdir))
  return outcome
