"""The training run, top to bottom."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding

from gdn2_jax.data.pipeline import check_batch, open_dataset
from gdn2_jax.model.accounting import count_parameters, train_flops_per_token
from gdn2_jax.model.lm import LM
from gdn2_jax.sharding import batch_sharding, make_mesh, use_mesh
from gdn2_jax.train.checkpoint.manager import Checkpointer, make_meta
from gdn2_jax.train.checkpoint.resume import resume
from gdn2_jax.train.config import (
  TrainConfig,
  config_to_json,
  preflight,
  validate,
)
from gdn2_jax.train.device_put import part_to_read, put_batch
from gdn2_jax.train.evaluation import brief, eval_row, evaluate
from gdn2_jax.train.optimizer import learning_rate
from gdn2_jax.train.processes.join import leaving_if_a_peer_is_lost
from gdn2_jax.train.processes.lock import WorkdirLock
from gdn2_jax.train.processes.preemption import Preemption
from gdn2_jax.train.processes.watchdog import Watchdog
from gdn2_jax.train.report import writer as writer_lib
from gdn2_jax.train.report.final import finish
from gdn2_jax.train.report.metrics import MetricsReader, Progress
from gdn2_jax.train.report.skipped import SkippedBatches
from gdn2_jax.train.report.throughput import Throughput
from gdn2_jax.train.state import TrainState, init_state, plan_state
from gdn2_jax.train.step import make_train_step

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Result:
  """How a run ended.

  Attributes:
    state: at the end.
    step: finished steps.
    stopped_by: "" if all steps are done, else what asked to stop.
  """

  state: TrainState
  step: int
  stopped_by: str


def train(
  config: TrainConfig,
  workdir: str | os.PathLike,
  *,
  dataset: Any = None,
  say: Say = print,
) -> Result:
  """Trains from the newest checkpoint of the workdir, or from the start.

  Args:
    config: the experiment.
    workdir: holds config.json, versions.json, tokenizer.json, metrics.jsonl,
      tensorboard/ and checkpoints/; at the end also eval.json and loss.png.
    dataset: what `open_dataset(config.data)` returns; None opens it.
    say: prints a line; only process 0 calls it.

  Raises:
    ValueError: the config, the data or the checkpoint does not fit.
    DivergedError: too many batches in a row without a finite update.
    SaveError: too many saves in a row failed, or the last one did.
  """
  validate(config)
  preflight(config, jax.device_count(), jax.process_count())
  root = pathlib.Path(workdir)
  first = jax.process_index() == 0
  say = say if first else (lambda line: None)
  with contextlib.ExitStack() as stack:
    if first:
      writer_lib.probe(root)
    lock = stack.enter_context(WorkdirLock(root)) if first else None
    dataset = open_dataset(config.data) if dataset is None else dataset
    _check_vocabulary(config, dataset)
    versions = writer_lib.versions()
    say(_summary(config, versions))
    throughput = Throughput(
      config.data.batch_size * config.data.seq_len,
      train_flops_per_token(config.model, config.data.seq_len),
    )

    mesh = stack.enter_context(use_mesh(make_mesh(config.mesh)))
    model = LM(config.model)
    blueprint = plan_state(model, config.optimizer, config.num_steps, mesh)
    train_step = make_train_step(
      model,
      blueprint,
      mesh,
      schedule=learning_rate(config.optimizer, config.num_steps),
      accumulate=config.grad_accum,
      skip_norm=config.optimizer.skip_norm,
    )

    checkpointer = Checkpointer(root / "checkpoints", config.checkpoint, say)
    # A failed background save surfaces here, so the exit code shows it.
    stack.callback(checkpointer.close)
    meta = make_meta(config, dataset.fingerprint, versions, blueprint.abstract)
    resumed = resume(
      config.checkpoint, checkpointer, blueprint.abstract, meta, say
    )
    state, step = resumed or (init_state(model, blueprint, config.seed), 0)
    if first:
      _describe_run(root, config, versions, dataset)

    writer = stack.enter_context(
      contextlib.closing(writer_lib.Writer(root, step))
    )
    progress = stack.enter_context(
      contextlib.closing(
        Progress(step, config.num_steps, say if first else None)
      )
    )
    watchdog = stack.enter_context(Watchdog(config.watchdog_seconds))
    # Innermost: what was entered before waits for the peers as it leaves.
    stack.enter_context(leaving_if_a_peer_is_lost())
    result = _run_steps(
      config,
      state,
      step,
      train_step,
      dataset=dataset,
      sharding=batch_sharding(mesh),
      checkpointer=checkpointer,
      meta=meta,
      writer=writer,
      throughput=throughput,
      progress=progress,
      skipped=SkippedBatches(root / "skipped.jsonl", dataset),
      beat=lock.beat if lock else (lambda: None),
      watchdog=watchdog,
    )
    with watchdog.saving():
      checkpointer.finish(result.step, result.state, meta)
    if result.stopped_by:
      say(f"{result.stopped_by}: saved step {result.step}, stopping")
    else:
      progress.close()
      with watchdog.paused():
        finish(
          config,
          root,
          result.state.params,
          dataset,
          step=result.step,
          writer=writer,
          say=say,
        )
  return result


def _run_steps(
  config: TrainConfig,
  state: TrainState,
  first_step: int,
  train_step: Callable,
  *,
  dataset: Any,
  sharding: NamedSharding,
  checkpointer: Checkpointer,
  meta: dict[str, Any],
  writer: writer_lib.Writer,
  throughput: Throughput,
  progress: Progress,
  skipped: SkippedBatches,
  beat: Callable[[], None],
  watchdog: Watchdog,
) -> Result:
  """The loop: dispatch a step, read the step before, save and evaluate."""
  reader = MetricsReader(
    writer,
    throughput,
    progress,
    log_every=config.log_every,
    max_skipped=config.max_skipped,
    note_skipped=skipped.note,
  )
  part = part_to_read(sharding, config.data.batch_size, config.data.seq_len)
  batches = dataset.train_batches(
    start_step=first_step,
    process_index=part.index,
    process_count=part.count,
  )
  step, stopped_by = first_step, ""
  with Preemption(checkpointer.reached_preemption) as preemption:
    while step < config.num_steps and not stopped_by:
      batch = next(batches)
      check_batch(batch, config.model.vocab_size)
      # Anything that moves between host and device by accident is an error.
      with jax.transfer_guard("disallow"):
        state, metrics = train_step(state, put_batch(batch, sharding, part))
      step += 1
      reader.push(step, metrics)
      beat()
      if step > first_step + 1:
        # A step has been read back; the first one may have compiled for long.
        watchdog.beat()

      if preemption.due(step):
        stopped_by = preemption.reason
      last = step == config.num_steps
      if _is_due(step, config.eval.every_steps) and not (last or stopped_by):
        reader.pause()
        with watchdog.paused():
          reports = evaluate(config, state.params, dataset, multiples=(1,))
        writer.write(step, "eval", eval_row(reports, (1,)))
        progress.say(f"step {step:>6}  validation {brief(reports[0])}")
      if last or stopped_by or _is_due(step, config.checkpoint.every_steps):
        # The rows up to a step are on disk before its checkpoint is: a resume
        # drops later rows and finds no gap.
        reader.pause()
        with watchdog.saving():
          checkpointer.save(step, state, meta)
  reader.flush()
  return Result(state=state, step=step, stopped_by=stopped_by)


def _is_due(step: int, every: int) -> bool:
  return every > 0 and step % every == 0


def _check_vocabulary(config: TrainConfig, dataset: Any) -> None:
  have = dataset.tokenizer.vocab_size
  if have > config.model.vocab_size:
    raise ValueError(
      f"--config.model.vocab_size={config.model.vocab_size}: the tokenizer "
      f"{config.data.tokenizer!r} has {have} tokens"
    )


def _describe_run(root: pathlib.Path, config, versions, dataset) -> None:
  writer_lib.write_json(root / "versions.json", versions)
  writer_lib.write_atomically(root / "config.json", config_to_json(config))
  dataset.tokenizer.save(root / "tokenizer.json")


def _summary(config: TrainConfig, versions: Mapping[str, str]) -> str:
  model, data = config.model, config.data
  return (
    f"{count_parameters(model).total:,} parameters, "
    f"{model.num_layers} layers {model.pattern!r}, width {model.model_dim}; "
    f"{config.num_steps:,} steps of {data.batch_size} x {data.seq_len} tokens; "
    f"{versions['device']}"
  )
