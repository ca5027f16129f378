"""Checkpoints: written in the background, atomic, refused unless they fit.

    WORKDIR/checkpoints/STEP/params      parameters
    WORKDIR/checkpoints/STEP/optimizer   the rest of TrainState
    WORKDIR/checkpoints/STEP/meta        JSON: format, config, data, shapes

STEP counts finished steps and is also the data position. The three are
committed together by one rename; a directory without the marker file of that
commit does not exist for us, whatever its name.
"""

import dataclasses
import json
import os
import pathlib
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, SingleDeviceSharding

from gdn2_jax.data.tokenizer import load_tokenizer
from gdn2_jax.model.lm import LM
from gdn2_jax.train.checkpoint_config import CheckpointConfig
from gdn2_jax.train.config import TrainConfig, config_from_json, differences
from gdn2_jax.train.state import TrainState, abstract_params

FORMAT = 1
_COMMITTED = "commit_success.txt"
_TRASH = ".trash"

# Fields of ModelConfig that change how, not what, is computed.
_NOT_ARCHITECTURE = ("dtype", "remat", "loss_chunk", "implementation")


class CheckpointError(ValueError):
  """A checkpoint is missing, or does not fit what is asked of it."""


def committed_steps(directory: str | os.PathLike) -> list[int]:
  """Steps whose checkpoint is complete, in ascending order."""
  root = pathlib.Path(directory)
  if not root.is_dir():
    return []
  return sorted(
    int(path.name)
    for path in root.iterdir()
    if _is_step(path) and (path / _COMMITTED).is_file()
  )


def _is_step(path: pathlib.Path) -> bool:
  return path.name.isascii() and path.name.isdigit() and path.is_dir()


def tree_spec(tree: Any) -> dict[str, list]:
  """{path: [shape, dtype]} of every leaf, as it is stored in the meta data."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): [
      list(leaf.shape),
      str(leaf.dtype),
    ]
    for path, leaf in leaves
  }


def make_meta(
  config: TrainConfig, fingerprint: str, versions: dict[str, str], state: Any
) -> dict[str, Any]:
  """The JSON stored with every checkpoint, but for its step."""
  return {
    "format": FORMAT,
    "config": dataclasses.asdict(config),
    "data_fingerprint": fingerprint,
    "versions": versions,
    "tree": tree_spec(state),
  }


def check_meta(
  saved: dict[str, Any], wanted: dict[str, Any], *, allow_data_change: bool
) -> None:
  """Refuses a checkpoint that another experiment wrote.

  Orbax itself casts dtypes silently and knows nothing of architectures.

  Args:
    saved: meta data of the checkpoint.
    wanted: `make_meta` of the run that wants to resume from it.
    allow_data_change: accept another data fingerprint.

  Raises:
    CheckpointError: showing the checkpoint's value and the run's value.
  """
  if saved.get("format") != FORMAT:
    raise CheckpointError(
      f"checkpoint format {saved.get('format')!r}, this version reads {FORMAT}"
    )
  changes = list(
    differences(
      _architecture(saved["config"]["model"]),
      _architecture(wanted["config"]["model"]),
      "--config.model",
    )
  )
  changes += list(differences(saved["tree"], wanted["tree"]))
  if changes:
    shown = "\n  ".join(changes[:10])
    more = f"\n  and {len(changes) - 10} more" if len(changes) > 10 else ""
    raise CheckpointError(
      "the checkpoint holds another model (checkpoint -> this run):\n"
      f"  {shown}{more}\nuse another --workdir, or the checkpoint's config"
    )
  old, new = saved["data_fingerprint"], wanted["data_fingerprint"]
  if old != new and not allow_data_change:
    data = list(
      differences(
        saved["config"]["data"], wanted["config"]["data"], "--config.data"
      )
    )
    raise CheckpointError(
      "the data is not what the checkpoint was trained on: fingerprint "
      f"{old} in the checkpoint, {new} now"
      + "".join(f"\n  {line}" for line in data)
      + "\npass --config.checkpoint.allow_data_change to resume anyway"
    )


def _architecture(model: dict[str, Any]) -> dict[str, Any]:
  return {
    name: _architecture(value) if isinstance(value, dict) else value
    for name, value in model.items()
    if name not in _NOT_ARCHITECTURE
  }


def read_meta(directory: str | os.PathLike, step: int) -> dict[str, Any]:
  """Meta data of a committed checkpoint.

  Raises:
    CheckpointError: it is missing or damaged.
  """
  path = pathlib.Path(directory) / str(step) / "meta" / "metadata"
  try:
    meta = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as e:
    raise CheckpointError(f"{path}: unreadable meta data: {e}") from e
  if not isinstance(meta, dict):
    raise CheckpointError(f"{path}: expected a JSON object")
  return meta


class Checkpointer:
  """Saves and restores TrainState; every method on every process.

  Args:
    directory: of the numbered steps; made if missing.
    config: how many to keep.
  """

  def __init__(self, directory: str | os.PathLike, config: CheckpointConfig):
    self.directory = pathlib.Path(directory).absolute()
    if jax.process_index() == 0:
      self.directory.mkdir(parents=True, exist_ok=True)
      self._discard_uncommitted()
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("checkpoint directory is clean")
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=config.keep,
        cleanup_tmp_directories=True,
        # Makes deletion a rename: a kill cannot leave half a step behind.
        todelete_subdir=_TRASH,
      ),
      item_names=("params", "optimizer", "meta"),
    )

  def _discard_uncommitted(self) -> None:
    """Orbax would count such a step as the latest and refuse older saves."""
    committed = set(committed_steps(self.directory))
    for path in self.directory.iterdir():
      if _is_step(path) and int(path.name) not in committed:
        shutil.rmtree(path)
    self._empty_trash()

  def _empty_trash(self) -> None:
    if jax.process_index() == 0:
      for path in (self.directory / _TRASH).glob("*"):
        shutil.rmtree(path, ignore_errors=True)

  def latest_step(self) -> int | None:
    """The newest complete checkpoint, or None."""
    return max(committed_steps(self.directory), default=None)

  def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
    """Copies the state off the devices, then writes in the background.

    Raises:
      Exception: whatever made the previous save fail.
    """
    self._empty_trash()
    accepted = self._manager.save(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardSave(state.params),
        optimizer=ocp.args.StandardSave(_without_params(state)),
        meta=ocp.args.JsonSave({**meta, "step": step}),
      ),
      force=True,
    )
    if not accepted:
      # Orbax answers False, without an error, to a step it considers old.
      raise CheckpointError(f"checkpoint of step {step} was not accepted")

  def restore(self, step: int, abstract: TrainState) -> TrainState:
    """The state of a step, placed as `abstract` says.

    Shapes and dtypes must have been compared before (`check_meta`).
    """
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardRestore(abstract.params),
        optimizer=ocp.args.StandardRestore(_without_params(abstract)),
      ),
    )
    return TrainState(params=restored["params"], **restored["optimizer"])

  def reached_preemption(self, step: int) -> bool:
    """Whether all of several processes agreed to stop at this step."""
    return jax.process_count() > 1 and self._manager.reached_preemption(step)

  def wait(self) -> None:
    """Blocks until the save in progress is committed; raises if it failed."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the last save, raises if it failed, and stops the threads."""
    try:
      self._manager.wait_until_finished()
    finally:
      self._manager.close()
      self._empty_trash()


def _without_params(state: TrainState) -> dict[str, Any]:
  return {
    field.name: getattr(state, field.name)
    for field in dataclasses.fields(state)
    if field.name != "params"
  }


@dataclasses.dataclass(frozen=True)
class Run:
  """A trained model, as `load_run` finds it.

  Attributes:
    config: of the run that wrote the checkpoint.
    params: parameters, in the dtype they were trained in.
    tokenizer: with encode, decode, vocab_size and eos_id.
    step: of the checkpoint.
  """

  config: TrainConfig
  params: Any
  tokenizer: Any
  step: int


def load_run(
  workdir: str | os.PathLike,
  step: int | None = None,
  *,
  mesh: Mesh | None = None,
) -> Run:
  """Loads parameters and tokenizer of a run; the optimizer stays on disk.

  Args:
    workdir: of the run.
    step: which checkpoint; None takes the newest complete one.
    mesh: devices to shard the parameters over by the rules of
      `gdn2_jax.sharding`; None puts them on the first device.

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
  step = steps[-1] if step is None else step
  if step not in steps:
    have = ", ".join(map(str, steps))
    raise CheckpointError(f"--step={step}: no such checkpoint; have {have}")
  meta = read_meta(directory, step)
  if meta.get("format") != FORMAT:
    raise CheckpointError(
      f"checkpoint format {meta.get('format')!r}, this version reads {FORMAT}"
    )
  config = config_from_json(json.dumps(meta["config"]))
  abstract = _abstract_for_inference(LM(config.model), mesh)
  saved = {
    path.removeprefix("params/"): spec
    for path, spec in meta["tree"].items()
    if path.startswith("params/")
  }
  changes = list(differences(saved, tree_spec(abstract)))
  if changes:
    raise CheckpointError(
      f"step {step} does not fit its own config: {changes[0]}"
    )
  with ocp.StandardCheckpointer() as reader:
    params = reader.restore(directory / str(step) / "params", abstract)
  return Run(
    config=config,
    params=params,
    tokenizer=load_tokenizer(root / "tokenizer.json"),
    step=step,
  )


def _abstract_for_inference(model: LM, mesh: Mesh | None) -> Any:
  if mesh is not None:
    return abstract_params(model, mesh)
  here = SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
    abstract_params(model, None),
  )
