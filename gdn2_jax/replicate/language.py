"""Language models of a budget, trained by `python -m gdn2_jax.train`."""

import dataclasses
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

from gdn2_jax.eval.synthetic.rows import append_rows, read_rows
from gdn2_jax.train.report.writer import versions

SUITE = "language"


@dataclasses.dataclass(frozen=True)
class LanguageRun:
  """One language model.

  Attributes:
    mixer: Name in tables.
    config: Config file.
    seed: Of the initial parameters and of the order of the rows.
    flags: Further flags of the training command.
  """

  mixer: str
  config: str
  seed: int
  flags: tuple[str, ...]

  @property
  def key(self) -> str:
    """SHA-256 of everything that determines the run."""
    text = json.dumps([SUITE, 1, *dataclasses.astuple(self)])
    return hashlib.sha256(text.encode()).hexdigest()

  @property
  def name(self) -> str:
    """Name of its folder."""
    stem = pathlib.Path(self.config).stem
    return f"{stem}-{self.mixer}-{self.seed}-{self.key[:8]}"

  def command(self, folder: pathlib.Path) -> list[str]:
    """Command line that trains it."""
    return [
      sys.executable,
      "-m",
      "gdn2_jax.train",
      f"--config={self.config}",
      f"--workdir={folder / self.name}",
      f"--config.seed={self.seed}",
      *self.flags,
    ]


_LETTERS = {
  "gdn2": "G", "kda": "K", "gdn": "D", "deltanet": "E", "mamba2": "M",
  "mamba3": "N", "softmax": "A",
}  # fmt: skip
_ABLATIONS = {
  "b_only": "--config.model.gdn2.write_gate=scalar",
  "w_only": "--config.model.gdn2.erase_gate=scalar",
}


def _flags(mixer: str) -> tuple[str, ...]:
  """Flags that give a config the layers of a mixer."""
  if mixer in _ABLATIONS:
    return ("--config.model.pattern=G", _ABLATIONS[mixer])
  return (f"--config.model.pattern={_LETTERS[mixer]}",)


def language_runs(name: str, rehearse: bool) -> list[LanguageRun]:
  """The language models of a budget, none for "".

  Args:
    name: Budget.language of the plan.
    rehearse: The same commands with models that train in seconds on a CPU.
  """
  if not name:
    return []
  small, large = "configs/gdn2_30m.py", "configs/gdn2_120m.py"
  if name == "gpu15":
    # 20M tokens of the embedded corpus.
    plan = [(m, small, 0, ("--config.num_steps=600",)) for m in ("gdn2", "kda")]
  else:
    data = ("--config.data.source=fineweb_edu",)
    eight = (*_LETTERS, "b_only")
    # 500M tokens each at 32 x 1024 tokens a step; 2.5B for the larger.
    plan = [
      (m, small, seed, (*data, "--config.num_steps=15300"))
      for m in eight
      for seed in range(3)
    ]
    plan += [
      (m, large, seed, data) for m in ("gdn2", "kda", "gdn") for seed in (0, 1)
    ]
  if rehearse:
    toy = (
      "--config.model.model_dim=32",
      "--config.model.num_layers=2",
      "--config.model.mlp_dim=32",
      "--config.model.gdn2.num_heads=1",
      "--config.model.gdn2.key_dim=16",
      "--config.model.gdn2.value_dim=16",
      "--config.data.seq_len=64",
      "--config.data.batch_size=2",
      "--config.eval.batches=1",
      "--config.num_steps=4",
    )
    tiny = "configs/tiny_cpu.py"
    known = [p for p in plan if p[0] in ("gdn2", "kda", "gdn", "b_only")]
    plan = [(m, tiny, seed, toy) for m, _, seed, _ in known if seed == 0]
    plan = list(dict.fromkeys(plan))
  return [
    LanguageRun(mixer, config, seed, (*_flags(mixer), *flags))
    for mixer, config, seed, flags in plan
  ]


def run_language_model(run: LanguageRun, path: pathlib.Path) -> str | None:
  """Trains a model, unless the file has its row; appends its row.

  A run that was stopped goes on from its checkpoint.

  Args:
    run: The model.
    path: JSONL file of rows.

  Returns:
    None if it is done, else one line that says what failed.
  """
  if any(row["key"] == run.key for row in read_rows(path)):
    return None
  folder = path.parent / "language"
  log = folder / f"{run.name}.txt"
  log.parent.mkdir(parents=True, exist_ok=True)
  wall, cpu = time.perf_counter(), os.times()
  with open(log, "ab") as file:
    done = subprocess.run(
      run.command(folder), stdout=file, stderr=file, check=False
    )
  if done.returncode:
    return f"{run.name}: exit code {done.returncode}, see {log}"
  after = os.times()
  result = json.loads((folder / run.name / "eval.json").read_text())
  used = sum(after[2:4]) - sum(cpu[2:4])
  found = versions()
  row: dict[str, Any] = {
    "suite": SUITE,
    "mixer": run.mixer,
    "config": run.config,
    "flags": list(run.flags),
    "seed": run.seed,
    "role": "report",
    "metrics": result,
    "cpu_s": round(used, 1),
    "wall_s": round(time.perf_counter() - wall, 1),
    "device": found["device"],
    "jax": found["jax"],
    "git": found.get("git"),
    "key": run.key,
    "status": "done",
  }
  append_rows(path, [row])
  return None
