"""The training run, top to bottom."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from gdn2_jax.data.pipeline import check_batch, open_dataset
from gdn2_jax.model.accounting import count_parameters
from gdn2_jax.model.lm import LM
from gdn2_jax.sharding import batch_sharding, make_mesh, use_mesh
from gdn2_jax.train.checkpoint.manager import Checkpointer
from gdn2_jax.train.checkpoint.meta import committed_steps, make_meta
from gdn2_jax.train.checkpoint.resume import resume
from gdn2_jax.train.config import TrainConfig, preflight, validate
from gdn2_jax.train.device_put import part_to_read, put_batch
from gdn2_jax.train.processes.guard import Guard
from gdn2_jax.train.processes.join import leaving_if_a_peer_is_lost
from gdn2_jax.train.processes.lock import WorkdirLock
from gdn2_jax.train.processes.watchdog import Watchdog
from gdn2_jax.train.report import writer as writer_lib
from gdn2_jax.train.report.interval import Interval
from gdn2_jax.train.report.report import Report
from gdn2_jax.train.report.result import Result
from gdn2_jax.train.report.writers import Writer, check_writers
from gdn2_jax.train.start import check_tokenizer, first_state, open_source
from gdn2_jax.train.state import plan_state
from gdn2_jax.train.step import make_train_step

Say = Callable[[str], None]


def train(
  config: TrainConfig,
  workdir: str | os.PathLike,
  *,
  dataset: Any = None,
  say: Say = print,
  writers: Sequence[Writer] = (),
) -> Result:
  """Trains from the newest checkpoint of the workdir, or from the start.

  A function of its arguments and of the files in the workdir: call it as often
  as you like in one process, with configs made in Python (docs/research.md).

  Args:
    config: the experiment.
    workdir: holds config.json, versions.json, tokenizer.json, metrics.jsonl,
      tensorboard/ and checkpoints/; at the end also eval.json and loss.png.
    dataset: an open `open_dataset(config.data)`; None opens it.
    say: prints a line; called on process 0 only. `lambda line: None` is quiet.
    writers: get every row of metrics.jsonl, beside the writers that
      config.report names; closed at the end.

  Returns:
    The state after the last step, and all metrics of the run.

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
  check_writers(config.report)
  with contextlib.ExitStack() as stack:
    if first:
      writer_lib.probe(root)
    lock = stack.enter_context(WorkdirLock(root)) if first else None
    # Before the data, which may take minutes to build.
    starts = config.init_from and not committed_steps(root / "checkpoints")
    source = open_source(config) if starts else None
    dataset = open_dataset(config.data) if dataset is None else dataset
    _check_data(config, dataset)
    if source is not None:
      check_tokenizer(config, source, dataset.tokenizer)
    versions = writer_lib.versions()
    say(_summary(config, versions))
    say(_data_summary(config, dataset))

    mesh = stack.enter_context(use_mesh(make_mesh(config.mesh)))
    model = LM(config.model)
    blueprint = plan_state(model, config.optimizer, config.num_steps, mesh)
    train_step = make_train_step(config, model, blueprint, mesh)

    checkpointer = Checkpointer(root / "checkpoints", config.checkpoint, say)
    # Raises if the last background save failed, so the exit code shows it.
    stack.callback(checkpointer.close)
    meta = make_meta(config, dataset.fingerprint, versions, blueprint.abstract)
    resumed = resume(checkpointer, blueprint.abstract, meta)
    # Written only now: a refused run must not change the workdir.
    if resumed is None:
      state = first_state(config, model, blueprint, source, say)
      step, interval = 0, Interval()
    else:
      state, saved = resumed
      step, interval = saved["step"], Interval.of_checkpoint(saved)
    del resumed, source  # the state is donated to the first step
    if first:
      writer_lib.write_json(root / "versions.json", versions)
      writer_lib.write_json(root / "config.json", dataclasses.asdict(config))
      dataset.tokenizer.save(root / "tokenizer.json")

    report = Report(config, root, dataset, step, say, writers, interval)
    stack.callback(report.close)
    watchdog = stack.enter_context(Watchdog(config.watchdog_seconds))
    guard = Guard(lock, watchdog, checkpointer.reached_preemption)
    # Entered last, so left first: the clean-up of the others waits for peers.
    stack.enter_context(leaving_if_a_peer_is_lost())

    # Each process reads the rows that its devices hold.
    sharding = batch_sharding(mesh)
    part = part_to_read(sharding, config.data.batch_size, config.data.seq_len)
    batches = dataset.train_batches(
      start_step=step, process_index=part.index, process_count=part.count
    )
    if step < config.num_steps:
      say("compiling the training step")
    stopped_by = ""
    with guard.taking_signals():
      while step < config.num_steps and not stopped_by:
        batch = next(batches)
        # On the host: on a device, an id out of range reads another row.
        check_batch(batch, config.model.vocab_size)
        # Any other transfer between host and device is a mistake: an error.
        with jax.transfer_guard("disallow"):
          state, metrics = train_step(state, put_batch(batch, sharding, part))
        step += 1
        # Reads the metrics of the step before this one: the devices have work
        # queued while the host waits for numbers and writes them.
        report.push(step, metrics)
        guard.beat()

        # Several processes all ask, at every step, and get the same answer.
        stopped_by = guard.stop_reason(step)
        stops = bool(stopped_by) or step == config.num_steps
        if _is_due(step, config.eval.every_steps) and not stops:
          report.pause()
          with watchdog.paused():
            report.evaluate(step, state.params)
        if stops or _is_due(step, config.checkpoint.every_steps):
          # The rows up to a step are on disk before its checkpoint: a resume
          # drops later rows, and finds no gap.
          report.pause()
          with watchdog.saving():
            meta["interval"] = dataclasses.asdict(report.interval)
            checkpointer.save(step, state, meta)
    # Ends the threads and workers of the data before the evaluation.
    del batches
    with watchdog.saving():
      checkpointer.finish(step, state, meta)
    if stopped_by:
      say(f"{stopped_by}: saved step {step}, stopping")
    else:
      with watchdog.paused():
        report.finish(step, state.params)
  rows = tuple(writer_lib.read_rows(root / "metrics.jsonl")) if first else ()
  return Result(state=state, step=step, stopped_by=stopped_by, rows=rows)


def _is_due(step: int, every: int) -> bool:
  return every > 0 and step % every == 0


def _check_data(config: TrainConfig, dataset: Any) -> None:
  have = dataset.tokenizer.vocab_size
  if have > config.model.vocab_size:
    raise ValueError(
      f"--config.model.vocab_size={config.model.vocab_size}: the tokenizer "
      f"{config.data.tokenizer!r} has {have} tokens"
    )
  _ = dataset.validation_bytes_per_token  # raises if there is no such text


def _data_summary(config: TrainConfig, dataset: Any) -> str:
  splits = [part.manifest["splits"] for part in dataset.parts]
  train, held_out = (
    sum(split[name]["tokens"] for split in splits)
    for name in ("train", "validation")
  )
  return (
    f"{config.data.source}: {train:,} tokens, {held_out:,} more held out; "
    f"tokenizer {config.data.tokenizer} of {dataset.tokenizer.vocab_size:,} ids"
  )


def _summary(config: TrainConfig, versions: Mapping[str, str]) -> str:
  model, data = config.model, config.data
  return (
    f"{count_parameters(model).total:,} parameters, "
    f"{model.num_layers} layers {model.pattern!r}, width {model.model_dim}; "
    f"{config.num_steps:,} steps of {data.batch_size} x {data.seq_len} tokens; "
    f"{versions['device']}"
  )
