"""First state of a run: from a seed, or from the weights of another model."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from gdn2_jax.config_json import from_json
from gdn2_jax.data.tokenizer.api import load_tokenizer
from gdn2_jax.interop import flatten_params, hub
from gdn2_jax.interop.folder import (
  TOKENIZER,
  is_model_folder,
  open_folder,
  read_config,
)
from gdn2_jax.interop.tree import (
  check_tensors,
  leaf_sources,
  leaves_by_path,
  nested,
  param_specs,
)
from gdn2_jax.model.config import (
  EXECUTION,
  LAYOUT,
  NUMERICS,
  ModelConfig,
  without,
)
from gdn2_jax.train.checkpoint.load import load_run
from gdn2_jax.train.config import TrainConfig, differences
from gdn2_jax.train.state import Blueprint, TrainState, init_state, state_around

_NO_SOURCE = (
  "expected the workdir of a run, a folder that `export` or `convert` wrote, "
  "or hf:USER/NAME@REVISION"
)


@dataclasses.dataclass(frozen=True)
class Source:
  """A model whose weights a run starts from.

  Attributes:
    config: its model config.
    tensors: its parameters by flat name, read when they are used.
    tokenizer: None without one.
  """

  config: ModelConfig
  tensors: Mapping[str, Any]
  tokenizer: Any


def find_source(name: str) -> tuple[pathlib.Path, bool]:
  """Folder of a source, and True for a published one, False for a run.

  Raises:
    ValueError: neither of the two.
    ConnectionError: the Hub cannot be reached.
  """
  folder = hub.fetch(name) if hub.is_hub_name(name) else pathlib.Path(name)
  folder = folder.expanduser()
  published = is_model_folder(folder)
  if not published and not (folder / "checkpoints").is_dir():
    raise ValueError(f"--config.init_from={name}: {_NO_SOURCE}")
  return folder, published


def read_model(name: str) -> tuple[ModelConfig, pathlib.Path | None]:
  """Model config of a source, and its tokenizer.json if it has one."""
  folder, published = find_source(name)
  if published:
    config = read_config(folder / "config.json")
  else:
    text = (folder / "config.json").read_text(encoding="utf-8")
    config = from_json(TrainConfig, text).model
  tokenizer = folder / TOKENIZER
  return config, tokenizer if tokenizer.is_file() else None


def open_source(config: TrainConfig) -> Source:
  """The source of --config.init_from, whose parameters fit --config.model.

  Dtypes may differ: parameters are cast to those of the run.

  Raises:
    ValueError: no such source, a damaged one, or one with other parameters.
    ConnectionError: the Hub cannot be reached.
  """
  name = config.init_from
  folder, published = find_source(name)
  if published:
    model, tensors = open_folder(folder)
    path = folder / TOKENIZER
    tokenizer = load_tokenizer(path) if path.exists() else None
  else:
    run = load_run(folder)
    model, tokenizer = run.config.model, run.tokenizer
    tensors = flatten_params(run.params, model)
  expected = {
    name: jax.ShapeDtypeStruct(spec.shape, tensors[name].dtype)
    if name in tensors
    else spec
    for name, spec in param_specs(config.model).items()
  }
  try:
    check_tensors(tensors, expected, f"--config.init_from={name}")
  except ValueError as e:
    raise ValueError(f"{e}; --config=finetune:{name} takes its model") from None
  return Source(model, tensors, tokenizer)


def first_state(
  config: TrainConfig,
  model: nn.Module,
  blueprint: Blueprint,
  source: Source | None,
  say: Callable[[str], None],
) -> TrainState:
  """State of step 0: parameters of `source`, if any, else of the seed.

  Call it under `gdn2_jax.sharding.use_mesh`.
  """
  if source is None:
    return init_state(model, blueprint, config.seed)
  say(f"parameters from {config.init_from}")
  for line in _changes(source.config, config.model):
    say(f"WARNING: changed since then: {line}")
  return state_around(
    _place(source.tensors, config.model, blueprint), blueprint
  )


def check_tokenizer(
  config: TrainConfig, source: Source, tokenizer: Any
) -> None:
  """Raises ValueError if the run's data has other tokens than the source."""
  known = source.tokenizer
  if known is not None and known.to_json() != tokenizer.to_json():
    raise ValueError(
      f"--config.data.tokenizer={config.data.tokenizer!r}: not the tokenizer "
      f"of --config.init_from={config.init_from}; expected its {TOKENIZER}"
    )


def _changes(source: ModelConfig, model: ModelConfig) -> list[str]:
  """Fields that change what the same parameters compute."""
  old, new = (
    without(
      dataclasses.asdict(config),
      *(*NUMERICS, *LAYOUT, *EXECUTION, "param_dtype"),
    )
    for config in (source, model)
  )
  return list(differences(old, new, "--config.model"))


def _place(
  tensors: Mapping[str, Any], config: ModelConfig, blueprint: Blueprint
) -> Any:
  """Parameters on the run's devices, read one leaf after the other."""
  wanted = leaves_by_path(blueprint.abstract.params, "/")
  params = {}
  for leaf in leaf_sources(config):
    abstract = wanted["/".join(leaf.path)]
    parts = [np.asarray(tensors[name]) for name in leaf.names]
    value = np.stack(parts) if leaf.stacked else parts[0]
    value = value.astype(abstract.dtype)
    params[leaf.path] = jax.make_array_from_callback(
      value.shape, abstract.sharding, value.__getitem__
    )
  return nested(params)
