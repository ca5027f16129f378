"""The last word of a run: one table, eval.json and the loss curve."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax

from gdn2_jax.eval.ngram import ngram_baselines
from gdn2_jax.eval.report import LossReport, format_table
from gdn2_jax.train.config import TrainConfig
from gdn2_jax.train.evaluation import eval_row, evaluate
from gdn2_jax.train.report import writer as writer_lib
from gdn2_jax.train.report.plot import plot_loss


def finish(
  config: TrainConfig,
  workdir: pathlib.Path,
  params: Any,
  dataset: Any,
  *,
  step: int,
  writer: writer_lib.Writer,
  say: Callable[[str], None],
) -> list[LossReport]:
  """Evaluates at every length multiple, next to n-gram baselines.

  Writes eval.json, one last metrics row and loss.png; prints the table. All
  rows score the same validation text, so they compare directly.

  Args:
    config: of the run.
    workdir: of the run.
    params: trained parameters, on the current mesh.
    dataset: with validation_batches, train_tokens and the tokenizer.
    step: finished steps.
    writer: of the metrics.
    say: prints a line.

  Returns:
    One report per length multiple, then the baselines.
  """
  multiples = config.eval.length_multiples
  model_rows = evaluate(config, params, dataset, multiples=multiples)
  writer.write(step, "final", eval_row(model_rows, multiples))
  if jax.process_index() != 0:
    return model_rows
  baselines = ngram_baselines(
    dataset,
    seq_len=config.data.seq_len,
    # No limit, like 0 batches for the model.
    rows=config.eval.batches * config.eval.batch_size or None,
  )
  reports = [*model_rows, *baselines]
  writer_lib.write_json(
    workdir / "eval.json",
    {
      "step": step,
      "model": {
        f"{multiple}x": report.to_json()
        for multiple, report in zip(multiples, model_rows, strict=True)
      },
      "baselines": {report.name: report.to_json() for report in baselines},
    },
  )
  plot_loss(
    workdir / "loss.png",
    writer_lib.read_rows(workdir / "metrics.jsonl"),
    {report.name: report.nats_per_token for report in baselines},
  )
  say("")
  say(format_table(reports))
  return reports
