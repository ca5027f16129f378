"""The tiny run that everything is done to, and the truth to compare with."""

import dataclasses
import pathlib
import shutil
from collections.abc import Sequence

from gdn2_jax.faults.child import Child, Row, train_rows
from gdn2_jax.train.checkpoint import committed_steps, read_meta
from gdn2_jax.train.digest import total

CONFIG = '''"""A model so small that starting takes longer than training."""

from gdn2_jax.data.pipeline import DataConfig
from gdn2_jax.eval.perplexity import EvalConfig
from gdn2_jax.model.attention import AttentionConfig
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.gdn2 import GDN2Config
from gdn2_jax.sharding import MeshConfig
from gdn2_jax.train.checkpoint_config import CheckpointConfig
from gdn2_jax.train.config import TrainConfig
from gdn2_jax.train.optimizer import OptimizerConfig


def get_config():
  return TrainConfig(
    model=ModelConfig(
      vocab_size=260,
      model_dim=32,
      num_layers=2,
      pattern="GS",
      mlp_dim=32,
      gdn2=GDN2Config(
        num_heads=2, key_dim=16, value_dim=16, implementation="reference"
      ),
      attention=AttentionConfig(num_heads=2, head_dim=8, window=8),
      dtype="float32",
      loss_chunk=32,
      scan_layers=False,
    ),
    data=DataConfig(
      source="snapshot",
      tokenizer="bytes",
      seq_len=16,
      batch_size=8,
      cache_dir={cache_dir!r},
      num_threads=0,
    ),
    optimizer=OptimizerConfig(lr=1e-2, final_lr=1e-3, warmup_fraction=0.2),
    mesh=MeshConfig(fsdp=-1),
    checkpoint=CheckpointConfig(every_steps=1, keep=3),
    eval=EvalConfig(
      every_steps=0, batches=1, batch_size=8, length_multiples=(1,)
    ),
    num_steps={num_steps},
    log_every=1,
    max_skipped=2,
  )
'''

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
