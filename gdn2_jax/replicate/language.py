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


# Fields of the model config, by mixer. All get the same widths; compare their
# parameters with `python -m gdn2_jax.plan`.
_MIXERS = {
  "gdn2": ("pattern=G",),
  "kda": ("pattern=K",),
  "gdn": ("pattern=D",),
  "deltanet": ("pattern=E",),
  "b_only": ("pattern=G", "gdn2.write_gate=scalar"),
  "w_only": ("pattern=G", "gdn2.erase_gate=scalar"),
  "gdn2_swa": ("pattern=GS",),
  "softmax": ("pattern=A",),
}
_TOY = (
  *("model.model_dim=32", "model.num_layers=2", "model.mlp_dim=32"),
  *("model.gdn2.num_heads=1", "model.gdn2.key_dim=16"),
  *("model.gdn2.value_dim=16", "model.attention.num_heads=1"),
  *("data.seq_len=64", "data.batch_size=2", "num_steps=4"),
  *("eval.batches=1", "eval.batch_size=2", "log_every=1"),
)


def _flags(mixer: str, *fields: str) -> tuple[str, ...]:
  model = (f"model.{field}" for field in _MIXERS[mixer])
  return tuple(f"--config.{field}" for field in (*model, *fields))


def language_runs(
  name: str, *, rehearse: bool = False, data: str = ""
) -> list[LanguageRun]:
  """The language models of a budget, none for "".

  Args:
    name: Budget.language of the plan.
    rehearse: The same commands with models that train in seconds on a CPU.
    data: Folder of packed rows, tokenized with `FOLDER/tokenizer.json` of
      32,000 entries, for the budget of a day.

  Raises:
    ValueError: `data` is missing.
  """
  if not name:
    return []
  if rehearse:
    mixers = ("gdn2", "kda") if name == "gpu15" else tuple(_MIXERS)
    tiny = "configs/tiny_cpu.py"
    return [LanguageRun(m, tiny, 0, _flags(m, *_TOY)) for m in mixers]
  small, large = "configs/gdn2_30m.py", "configs/gdn2_120m.py"
  if name == "gpu15":
    # 20M tokens of the corpus that needs no download.
    return [
      LanguageRun(m, small, 0, _flags(m, "num_steps=600"))
      for m in ("gdn2", "kda")
    ]
  if not data:
    raise ValueError(
      "--data is missing: expected a folder of packed rows for the language"
      " models of this budget (docs/data.md)"
    )
  rows = (f"data.source={data}", f"data.tokenizer={data}/tokenizer.json")
  # 500M tokens each at 32 x 1024 tokens a step; 2.5B for the larger.
  vocabulary = ("model.vocab_size=32000", "num_steps=15300")
  return [
    LanguageRun(m, small, seed, _flags(m, *rows, *vocabulary))
    for m in _MIXERS
    for seed in range(3)
  ] + [
    LanguageRun(m, large, seed, _flags(m, *rows))
    for m in ("gdn2", "kda", "gdn")
    for seed in range(2)
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
