"""Evaluates a trained model and n-gram baselines on the validation text.

  python -m gdn2_jax.eval loss --workdir=runs/tiny
  python -m gdn2_jax.eval loss --workdir=runs/tiny --lengths=1,2,4,8 --batches=0
  python -m gdn2_jax.eval loss --workdir=runs/tiny --step=500 --json=eval.json

Prints one table (nats/token, bits/byte, perplexity): the model with rows of
1x, 2x, 4x the training length, a unigram and a Kneser-Ney bigram, all on the
same targets; then the loss by position in the document. The batch is sharded
over all devices. Exit status: 0 done, 1 refused (reason on standard error).
"""

import dataclasses
import json
import pathlib
from typing import Any

import tqdm
from absl import flags

from gdn2_jax import cli
from gdn2_jax.data.pipeline import open_dataset
from gdn2_jax.eval.loss.ngram import ngram_baselines
from gdn2_jax.eval.loss.perplexity import (
  EvalConfig,
  evaluate_lengths,
  rows_per_batch,
  scored_tokens,
)
from gdn2_jax.eval.loss.report import LossReport, format_positions, format_table
from gdn2_jax.eval.loss.targets import num_batches
from gdn2_jax.files import write_atomically
from gdn2_jax.sharding import MeshConfig, make_mesh, use_mesh
from gdn2_jax.train.checkpoint import Run, load_run

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a training run.")
_STEP = flags.DEFINE_integer(
  "step", None, "Step of the checkpoint to load; by default the newest."
)
_LENGTHS = flags.DEFINE_list(
  "lengths",
  None,
  "Row lengths as multiples of the training length; by default the run's.",
)
_BATCHES = flags.DEFINE_integer(
  "batches",
  None,
  "Number of batches to score; 0 = the whole split; by default the run's.",
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", None, "Rows per batch; by default the run's."
)
_JSON = flags.DEFINE_string("json", None, "JSON file to write the results to.")


def main(argv: list[str]) -> None:
  """Entry point: checks the command line, loads the run, prints the table."""
  cli.refuse_positional(argv, "--lengths=1,2,4")
  with cli.one_line_errors():
    _check_flags()
    mesh = make_mesh(MeshConfig(data=-1))
    run = load_run(_WORKDIR.value, _STEP.value, mesh=mesh)
    dataset = open_dataset(run.config.data)
    with use_mesh(mesh):
      reports = _evaluate(run, dataset, _config(run.config.eval))
    if _JSON.value:
      content = {
        "workdir": str(_WORKDIR.value),
        "step": run.step,
        "results": [report.to_json() for report in reports],
      }
      data = json.dumps(content, indent=2) + "\n"
      write_atomically(pathlib.Path(_JSON.value), data.encode())
  print(f"{_WORKDIR.value}, step {run.step}\n\n{format_table(reports)}")
  models = [report for report in reports if report.by_position]
  longest = max(models, key=lambda report: report.seq_len)
  print(f"\n{longest.name} by position in the document")
  print(format_positions(longest))


def _check_flags() -> None:
  if not _WORKDIR.value:
    raise ValueError("--workdir is missing, e.g. --workdir=runs/tiny")
  for flag, low in ((_BATCHES, 0), (_BATCH_SIZE, 1)):
    if flag.value is not None and flag.value < low:
      raise ValueError(f"--{flag.name}={flag.value}: expected >= {low}")
  if _LENGTHS.value is not None and not (
    _LENGTHS.value
    and all(n.isdecimal() and int(n) >= 1 for n in _LENGTHS.value)
  ):
    raise ValueError(
      f"--lengths={','.join(_LENGTHS.value)}: expected whole numbers >= 1, as "
      "in --lengths=1,2,4"
    )
  # Checked before the evaluation, which takes long.
  if _JSON.value and not pathlib.Path(_JSON.value).absolute().parent.is_dir():
    raise ValueError(f"--json={_JSON.value}: its folder does not exist")


def _config(config: EvalConfig) -> EvalConfig:
  """Applies the flags to the settings of the run."""
  changes: dict[str, Any] = {
    "batches": _BATCHES.value,
    "batch_size": _BATCH_SIZE.value,
    "length_multiples": _LENGTHS.value and tuple(map(int, _LENGTHS.value)),
  }
  given = {name: value for name, value in changes.items() if value is not None}
  return dataclasses.replace(config, **given)


def _evaluate(run: Run, dataset, config: EvalConfig) -> list[LossReport]:
  seq_len = run.config.data.seq_len
  tokens = scored_tokens(config, seq_len)
  shapes = [
    (multiple * seq_len, rows_per_batch(config, multiple))
    for multiple in config.length_multiples
  ]
  shapes.append((seq_len, config.batch_size))  # the baselines
  total = sum(
    num_batches(dataset, seq_len=length, batch_size=rows, tokens=tokens)
    for length, rows in shapes
  )
  with tqdm.tqdm(total=total, unit="batch", desc="eval", disable=None) as bar:
    reports = evaluate_lengths(
      run.config.model,
      run.params,
      dataset,
      seq_len=seq_len,
      config=config,
      on_batch=bar.update,
    )
    return reports + ngram_baselines(
      dataset,
      seq_len=seq_len,
      batch_size=config.batch_size,
      rows=config.batches * config.batch_size or None,
      on_batch=bar.update,
    )


if __name__ == "__main__":
  cli.run(main, __doc__)
