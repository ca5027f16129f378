"""Loading of checkpoints: arrays, their verification, trained models."""

import dataclasses
import math
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh, SingleDeviceSharding

from gdn2_jax.config_json import from_dict
from gdn2_jax.data.tokenizer.api import load_tokenizer
from gdn2_jax.model.lm import LM
from gdn2_jax.train.checkpoint.digest import digest
from gdn2_jax.train.checkpoint.meta import (
  CheckpointError,
  DamagedError,
  check_fields,
  check_files,
  committed_steps,
  read_meta,
  tree_spec,
)
from gdn2_jax.train.checkpoint.orbax_cleanup import end_orphans
from gdn2_jax.train.config import TrainConfig, differences
from gdn2_jax.train.processes.join import is_lost_peer
from gdn2_jax.train.state import abstract_params

_MAX_LAYERS = 100_000


def first_line(error: Exception) -> str:
  """First line of an error, without its middle part if that is long."""
  text = (str(error).strip() or "no message").splitlines()[0]
  if len(text) > 400:
    text = f"{text[:200]} ... {text[-200:]}"
  return f"{type(error).__name__}: {text}"


# Errors that are no damage: a retry, or another machine, may read the files.
_NOT_DAMAGE = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "DEADLINE_EXCEEDED")


def read_arrays(path: pathlib.Path, abstract: Any) -> Any:
  """The arrays of one item; DamagedError if the files do not hold them."""
  try:
    with ocp.StandardCheckpointer() as reader:
      return reader.restore(path, abstract)
  except Exception as e:
    refused = isinstance(e, (MemoryError, PermissionError))
    refused = refused or any(word in str(e) for word in _NOT_DAMAGE)
    if refused or is_lost_peer(e):
      raise
    reason = first_line(e)
  end_orphans()
  raise DamagedError(f"{path}: unreadable: {reason}")


def verify(items: dict[str, Any], meta: dict[str, Any]) -> None:
  """Raises DamagedError unless the arrays have the digests in `meta`."""
  saved, found = meta.get("digests"), digest(items)
  if not isinstance(saved, dict):
    raise DamagedError("the digests are missing")
  bad = [path for path, value in found.items() if saved.get(path) != value]
  if bad:
    raise DamagedError(
      f"{len(bad)} of {len(found)} arrays are not what was saved (digest), the "
      f"first is {bad[0]}"
    )


@dataclasses.dataclass(frozen=True)
class Run:
  """A trained model and its tokenizer.

  Attributes:
    config: the config of the run that wrote the checkpoint.
    params: parameters, in the dtype they were trained in.
    tokenizer: has encode, decode, vocab_size and eos_id.
    step: finished steps.
  """

  config: TrainConfig
  params: Any
  tokenizer: Any
  step: int


def _to_stderr(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def load_run(
  workdir: str | os.PathLike,
  step: int | None = None,
  *,
  mesh: Mesh | None = None,
  warn: Callable[[str], None] = _to_stderr,
) -> Run:
  """Loads parameters and tokenizer of a run; the optimizer stays on disk.

  Args:
    workdir: directory of the run.
    step: which checkpoint, and no other; None takes the newest good one.
    mesh: devices to shard the parameters over by the rules of
      `gdn2_jax.sharding`; None puts them on the first device.
    warn: takes a line about each damaged checkpoint that was passed over.

  Raises:
    CheckpointError: no such run or step, or a damaged one.
  """
  root = pathlib.Path(workdir).absolute()
  if not root.is_dir():
    raise CheckpointError(f"--workdir={workdir}: no such directory")
  directory = root / "checkpoints"
  steps = committed_steps(directory)
  if not steps:
    raise CheckpointError(
      f"--workdir={workdir}: no complete checkpoint in {directory}"
    )
  if step is not None and step not in steps:
    have = ", ".join(map(str, steps))
    raise CheckpointError(f"--step={step}: no such checkpoint; have {have}")
  candidates = reversed(steps) if step is None else [step]
  for candidate in candidates:
    try:
      config, params = _load_params(directory, candidate, mesh)
      break
    except DamagedError as e:
      if step is not None or candidate == steps[0]:
        raise DamagedError(f"checkpoint of step {candidate}: {e}") from e
      warn(f"WARNING: damaged checkpoint passed over: step {candidate}: {e}")
  tokenizer = load_tokenizer(root / "tokenizer.json")
  return Run(config, params, tokenizer, candidate)


def _load_params(
  directory: pathlib.Path, step: int, mesh: Mesh | None
) -> tuple[TrainConfig, Any]:
  """Config and verified parameters; sizes are compared before allocation."""
  meta = read_meta(directory, step)
  check_fields(meta)
  config = from_dict(TrainConfig, meta["config"], "config")
  saved = {
    path.removeprefix("params/"): spec
    for path, spec in meta["tree"].items()
    if path.startswith("params/")
  }
  claimed = sum(
    math.prod(shape) * jnp.dtype(dtype).itemsize
    for shape, dtype in saved.values()
  )
  folder = directory / str(step)
  check_files(folder, claimed)
  # Shapes cost nothing, but tracing this many layers would take for ever.
  if config.model.num_layers > _MAX_LAYERS:
    raise DamagedError(f"a model of {config.model.num_layers} layers")
  abstract = abstract_params(LM(config.model), mesh)
  if mesh is None:
    here = SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda x: x.update(sharding=here), abstract)
  changes = list(differences(saved, tree_spec(abstract)))
  if changes:
    raise DamagedError(f"it does not fit its own config: {changes[0]}")
  params = read_arrays(folder / "params", abstract)
  verify({"params": params}, meta)
  return config, params
