"""Models that the explorer opens: loaded ones, and paths of runs."""

import dataclasses
import os
import pathlib
from typing import Any

from gdn2_jax.interop.folder import Model, is_model_folder, load_model
from gdn2_jax.model.accounting import count_parameters
from gdn2_jax.train.checkpoint import Run, load_run


@dataclasses.dataclass(frozen=True)
class Opened:
  """A model with its name in titles.

  Attributes:
    name: such as "tiny_cpu, step 600", "" if it is not known.
    model: config, parameters and tokenizer.
  """

  name: str
  model: Model

  @property
  def title(self) -> str:
    """Heading of its pages."""
    return f"Gate explorer: {self.name}" if self.name else "Gate explorer"

  @property
  def facts(self) -> str:
    """Layers, heads, parameters and dtype in one line."""
    c = self.model.config
    count = count_parameters(c).total
    return (
      f"{c.num_layers} layers, pattern {c.pattern}, model width {c.model_dim}, "
      f"{c.gdn2.value_heads} heads of {c.gdn2.key_dim} x {c.gdn2.value_dim}, "
      f"vocabulary {c.vocab_size:,}, {count:,} parameters, {c.dtype}"
    )


def open_run(run: Any) -> Opened:
  """The model of a run.

  Args:
    run: from `load_run`, `load_model` or this function, or the path of a
      workdir or of a folder with a published model.

  Raises:
    ValueError: anything else, or as `load_run` and `load_model`.
    OSError: no such folder.
  """
  if isinstance(run, Opened):
    return run
  if isinstance(run, Model):
    return Opened("", run)
  if isinstance(run, Run):
    model = Model(run.config.model, run.params, run.tokenizer)
    return Opened(f"step {run.step}", model)
  if not isinstance(run, str | os.PathLike):
    raise ValueError(
      f"run={type(run).__name__}: expected a model of load_run or load_model, "
      "or the path of its folder"
    )
  name = pathlib.Path(run).absolute().name
  if is_model_folder(run):
    return Opened(name, load_model(run))
  opened = open_run(load_run(run))
  return Opened(f"{name}, {opened.name}", opened.model)
