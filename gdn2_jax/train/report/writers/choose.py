"""Choice of writers by a config, and writing to all of them."""

import contextlib
import dataclasses
import importlib.util
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from gdn2_jax.config_class import config_class, one_of
from gdn2_jax.config_json import to_json
from gdn2_jax.train.report.writers.jsonl import JsonlWriter
from gdn2_jax.train.report.writers.protocol import Writer

_NAMES = ("tensorboard", "wandb")


@config_class
class ReportConfig:
  """Metrics of a run beside metrics.jsonl, which is always written.

  Attributes:
    writers: "tensorboard" and "wandb" (Weights & Biases, an extra).
    project: Project in Weights & Biases.
    gates: Evaluations measure the gates of every layer on one row of the
      validation split: half-life of the decay, mean of erase and write gate.
  """

  writers: tuple[str, ...] = ("tensorboard",)
  project: str = "gdn2_jax"
  gates: bool = True


def validate(config: ReportConfig) -> None:
  """Raises ValueError naming the flag and a name that no writer has."""
  flag = f"--config.report.writers={config.writers!r}"
  for name in config.writers:
    if name not in ("jsonl", *_NAMES):
      raise ValueError(f"{flag}: {name!r}: expected {one_of(name, _NAMES)}")


def check_writers(config: ReportConfig) -> None:
  """Raises ValueError for a writer whose package is not installed."""
  if "wandb" in config.writers and importlib.util.find_spec("wandb") is None:
    raise ValueError(
      f"--config.report.writers={config.writers!r}: wandb is not installed; "
      "pip install 'gdn2-jax[wandb]'"
    )


class _All:
  """Writes to several writers."""

  def __init__(self, writers: Sequence[Writer]):
    self._writers = writers

  def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
    for writer in self._writers:
      writer.write(step, kind, values)

  def text(self, name: str, text: str) -> None:
    for writer in self._writers:
      writer.text(name, text)

  def close(self) -> None:
    # All of them, even if one raises.
    with contextlib.ExitStack() as stack:
      for writer in reversed(self._writers):
        stack.callback(writer.close)


def open_writers(
  config: Any,
  workdir: pathlib.Path,
  first_step: int,
  more: Sequence[Writer] = (),
) -> Writer:
  """A writer to all that the config names and to `more`; process 0 only.

  Args:
    config: the TrainConfig.
    workdir: directory of the run.
    first_step: step that the run goes on from.
    more: opened by the caller, closed by the run.
  """
  if jax.process_index() > 0:
    return _All(())
  names = config.report.writers
  jsonl = JsonlWriter(workdir, first_step)
  writers: list[Writer] = [jsonl]
  every = _All(writers)
  try:
    if "tensorboard" in names:
      from gdn2_jax.train.report.writers.tensorboard import TensorBoardWriter

      tokens = config.data.batch_size * config.data.seq_len
      writers.append(TensorBoardWriter(workdir, first_step, tokens, jsonl.kept))
    if "wandb" in names:
      from gdn2_jax.train.report.writers.wandb import WandbWriter

      tree = dataclasses.asdict(config)
      writers.append(
        WandbWriter(workdir, config.report.project, tree, jsonl.found)
      )
    writers += more
    every.text("config", to_json(config))
  except BaseException:
    every.close()
    raise
  return every
