"""The tiny run that everything is done to, and the truth to compare with."""

import dataclasses
import hashlib
import pathlib
import shutil
from collections.abc import Sequence

from gdn2_jax.train.checkpoint.meta import committed_steps, read_meta
from tests.faults.child import Child, Row, train_rows

CONFIG = """from tests.faults.tiny import tiny_config


def get_config():
  return tiny_config({cache_dir!r}, {num_steps})
"""

# The uninterrupted run keeps a checkpoint of every so many steps.
GRID = 10


@dataclasses.dataclass
class Lab:
  """A folder with the config, the uninterrupted run, and room for others.

  Attributes:
    folder: everything lies in it.
    num_steps: of a run.
  """

  folder: pathlib.Path
  num_steps: int = 400

  def __post_init__(self):
    self.folder = self.folder.absolute()
    self.folder.mkdir(parents=True, exist_ok=True)
    self.config_file = self.folder / "tiny_faults.py"
    self.config_file.write_text(
      CONFIG.format(
        cache_dir=str(self.folder / "cache"), num_steps=self.num_steps
      )
    )
    self.straight = self.folder / "straight"
    self.truth: dict[int, Row] = {}
    self.digests: dict[int, str] = {}
    self._made = 0

  def prepare(self) -> None:
    """Makes the run that nothing happens to.

    Raises:
      RuntimeError: even that one failed; with all it printed.
    """
    child = Child(
      self.config_file,
      self.straight,
      f"--config.checkpoint.every_steps={GRID}",
      "--config.checkpoint.keep=1000",
    )
    if child.end() != 0:
      raise RuntimeError(child.output)
    self.adopt_truth()

  def adopt_truth(self) -> None:
    """Reads what the uninterrupted run left behind."""
    self.truth = train_rows(self.straight)
    self.digests = digests_of(self.straight)

  def workdir(
    self, name: str, steps: Sequence[int] = (), programs: bool = True
  ) -> pathlib.Path:
    """A new workdir whose programs are compiled already.

    Args:
      name: for people who look into the folder.
      steps: checkpoints of the uninterrupted run that it starts with.
      programs: bring the compiled programs, too.
    """
    self._made += 1
    path = self.folder / f"{name}-{self._made}"
    path.mkdir()
    if programs:
      shutil.copytree(self.straight / ".jax_cache", path / ".jax_cache")
    for step in steps:
      shutil.copytree(
        self.straight / "checkpoints" / str(step),
        path / "checkpoints" / str(step),
      )
    return path

  def start(
    self,
    workdir: pathlib.Path,
    *flags: str,
    faults: Sequence[str] = (),
    devices: int = 1,
  ) -> Child:
    """The training command on a workdir, with a log of its own."""
    self._made += 1
    log = self.folder / f"{workdir.name}.{self._made}.log"
    return Child(
      self.config_file, workdir, *flags, faults=faults, log=log, devices=devices
    )

  def wrong_steps(self, workdir: pathlib.Path) -> list[int]:
    """Steps whose numbers or checkpoints differ from the truth in any bit."""
    rows = train_rows(workdir)
    wrong = {step for step, row in rows.items() if row != self.truth.get(step)}
    found = digests_of(workdir)
    wrong |= {
      step
      for step, value in found.items()
      if step in self.digests and value != self.digests[step]
    }
    return sorted(wrong)


def total(digests: dict[str, str]) -> str:
  """One line for the digests of a whole state, to compare runs by."""
  text = "\n".join(f"{path} {value}" for path, value in sorted(digests.items()))
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def digests_of(workdir: pathlib.Path) -> dict[int, str]:
  """{step: digest of the whole state} as the checkpoints state it."""
  directory = workdir / "checkpoints"
  return {
    step: total(read_meta(directory, step)["digests"])
    for step in committed_steps(directory)
  }


def newest(workdir: pathlib.Path) -> int:
  """The newest complete checkpoint, 0 if there is none."""
  return max(committed_steps(workdir / "checkpoints"), default=0)
