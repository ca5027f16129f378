"""TrainConfig: the experiment as one typed tree, and its checks.

Every field is declared where it is read: the model's in model/, the data's in
data/, and so on. A config file returns a TrainConfig; flags such as
`--config.optimizer.lr=3e-4` change single fields; `validate` and `preflight`
then refuse what cannot work, before anything is allocated.
"""

import dataclasses
import operator
import textwrap
from collections.abc import Iterator
from typing import Any

from gdn2_jax import config_json
from gdn2_jax.config_class import choices, config_class, field_texts
from gdn2_jax.data.pipeline import DataConfig
from gdn2_jax.eval.loss.perplexity import EvalConfig
from gdn2_jax.model.config import ModelConfig
from gdn2_jax.model.mixers.registry import MixerKind, kinds_of
from gdn2_jax.sharding import MeshConfig, check_divisible, mesh_shape
from gdn2_jax.train import optimizer as optimizer_lib
from gdn2_jax.train.optimizer import OptimizerConfig
from gdn2_jax.train.report.writers import choose
from gdn2_jax.train.report.writers.choose import ReportConfig


@config_class
class CheckpointConfig:
  """Saving and resuming.

  Attributes:
    every_steps: steps between saves; 0 = only at the end of the run or when it
      is asked to stop.
    keep: newest checkpoints kept; older ones are deleted. With 1 there is no
      other one to fall back on if that one is damaged later.
    max_failed_saves: failed saves in a row that end the run; fewer are
      reported, and training goes on.
    restore_step: resume from exactly this step, or fail; newer checkpoints
      are moved to checkpoints/.set_aside. 0 = from the newest good one.
    allow_data_change: resume although the data or its order differs from the
      checkpoint's.
    allow_fresh_start: start from step 0 if there are checkpoints but none is
      usable.
  """

  every_steps: int = 1000
  keep: int = 3
  max_failed_saves: int = 3
  restore_step: int = 0
  allow_data_change: bool = False
  allow_fresh_start: bool = False


@config_class
class TrainConfig:
  """One training run.

  Attributes:
    model: architecture.
    data: text, tokenizer, global batch size and row length.
    optimizer: AdamW or another optimizer, and its schedule.
    mesh: devices along each mesh axis.
    checkpoint: saving and resuming.
    eval: held-out loss during and after training.
    init_from: model whose parameters a new run starts from, with a fresh
      optimizer: the workdir of a run, a folder of `export` or `convert`, or
      hf:USER/NAME@REVISION. "" draws parameters by `seed`.
    report: writers of metrics beside metrics.jsonl.
    num_steps: optimizer steps, one global batch each.
    grad_accum: microbatches per batch; more of them need less memory.
    seed: seed of the initial parameters.
    log_every: steps between rows of metrics.jsonl, which are their means.
    max_skipped: batches in a row without an update that end the run.
    watchdog_seconds: seconds that a step may take, data included; after that
      the process prints its stacks and ends with exit code 75. 0 = no limit.
      The first step and evaluations have no limit, saves ten times as much.
    compilation_cache: keep compiled programs in WORKDIR/.jax_cache: a relaunch
      then starts in seconds.
  """

  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  optimizer: OptimizerConfig = dataclasses.field(
    default_factory=OptimizerConfig
  )
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  checkpoint: CheckpointConfig = dataclasses.field(
    default_factory=CheckpointConfig
  )
  eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
  init_from: str = ""
  report: ReportConfig = dataclasses.field(default_factory=ReportConfig)
  num_steps: int = 1000
  grad_accum: int = 1
  seed: int = 0
  log_every: int = 10
  max_skipped: int = 10
  watchdog_seconds: float = 600.0
  compilation_cache: bool = True


_LEAST = {
  "num_steps": 1,
  "grad_accum": 1,
  "log_every": 1,
  "max_skipped": 1,
  "watchdog_seconds": 0,
  "data.seq_len": 1,
  "data.batch_size": 1,
  "checkpoint.keep": 1,
  "checkpoint.every_steps": 0,
  "checkpoint.max_failed_saves": 1,
  "checkpoint.restore_step": 0,
  "eval.every_steps": 0,
  "eval.batches": 0,
  "eval.batch_size": 1,
}


def validate(config: TrainConfig) -> None:
  """Refuses values that cannot work on any machine.

  Raises:
    ValueError: names the flag, its value and what was expected.
  """
  config_json.check_types(config, "--config")
  for path, least in _LEAST.items():
    value = operator.attrgetter(path)(config)
    if value < least:
      raise ValueError(f"--config.{path}={value}: expected {least} or more")
  for multiple in config.eval.length_multiples:
    if multiple < 1:
      raise ValueError(
        f"--config.eval.length_multiples={config.eval.length_multiples}: "
        "expected positive multiples of --config.data.seq_len"
      )
  config.model.validate("--config.model")
  optimizer_lib.validate(config.optimizer)
  choose.validate(config.report)
  if config.data.batch_size % config.grad_accum:
    raise ValueError(
      f"--config.grad_accum={config.grad_accum} does not divide "
      f"--config.data.batch_size={config.data.batch_size}"
    )


def preflight(
  config: TrainConfig, num_devices: int, num_processes: int = 1
) -> None:
  """Refuses a validated config that does not fit the machine's devices.

  Raises:
    ValueError: names the flag, the dimension and the mesh axis.
  """
  shape = mesh_shape(config.mesh, num_devices)
  model, batch_size = config.model, config.data.batch_size
  sizes = [
    (
      "--config.data.batch_size / --config.grad_accum",
      "batch",
      batch_size // config.grad_accum,
    ),
    ("--config.data.seq_len", "length", config.data.seq_len),
    ("--config.model.model_dim", "embed", model.model_dim),
    ("--config.model.mlp_dim", "mlp", model.mlp_dim),
    ("--config.model.vocab_size", "vocab", model.vocab_size),
  ]
  kinds = kinds_of(model.pattern).values()
  for kind in kinds:
    sizes += [
      (f"--config.model.{field}", axis, size)
      for field, axis, size in kind.sizes(model)
    ]
  check_divisible(shape, sizes)
  if shape["context"] > 1:
    for kind in kinds:
      _check_split(kind, config, shape["context"])
  if batch_size % num_processes:
    raise ValueError(
      f"--config.data.batch_size={batch_size} does not divide over "
      f"{num_processes} processes"
    )


def _check_split(kind: MixerKind, config: TrainConfig, parts: int) -> None:
  """Refuses rows split into parts that a mixer cannot run on."""
  tokens, least = config.data.seq_len // parts, kind.min_shard(config.model)
  if least is None:
    raise ValueError(
      f"--config.mesh.context={parts}: expected 1, as {kind.name} in pattern="
      f"{config.model.pattern!r} cannot split the tokens of a row"
    )
  if tokens < least:
    raise ValueError(
      f"--config.mesh.context={parts} leaves {tokens} of"
      f" --config.data.seq_len={config.data.seq_len} tokens to a device;"
      f" {kind.name} needs {least}"
    )


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
  """Lines "field: old -> new" where two nested dicts differ."""
  if isinstance(old, dict) and isinstance(new, dict):
    for name in sorted(old | new):
      child = f"{path}.{name}" if path else name
      yield from differences(old.get(name), new.get(name), child)
    return
  as_lists = [list(x) if isinstance(x, tuple) else x for x in (old, new)]
  if as_lists[0] != as_lists[1]:
    yield f"{path}: {old!r} -> {new!r}"


def describe_fields(config: Any, path: str = "--config") -> Iterator[str]:
  """Lines for --help: every field with its default, choices and text."""
  texts, allowed = field_texts(type(config)), choices(type(config))
  groups = []
  for field in dataclasses.fields(config):
    value, where = getattr(config, field.name), f"{path}.{field.name}"
    if dataclasses.is_dataclass(value):
      groups.append((value, where, texts[field.name]))
      continue
    yield f"{where}={value!r}"
    if field.name in allowed:
      yield f"    one of {', '.join(map(repr, allowed[field.name]))}"
    yield from textwrap.wrap(
      texts[field.name], 74, initial_indent="    ", subsequent_indent="    "
    )
  for value, where, text in groups:
    yield from ("", f"{where}: {text}")
    yield from describe_fields(value, where)
