"""Models as they lie on disk, whatever their dialect, under our names."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from gdn2_jax.interop import folder
from gdn2_jax.interop.convert import fla, official
from gdn2_jax.interop.convert.claims import Claims, Shown, look_at
from gdn2_jax.interop.convert.options import OUTPUT_GATES, Options
from gdn2_jax.interop.convert.tensors import Lazy, check_names, to_ours
from gdn2_jax.interop.disk import read_json
from gdn2_jax.interop.names import FLOAT32, KDA, Dialect, Move, moves
from gdn2_jax.interop.tensors import find_weights, open_tensors
from gdn2_jax.interop.tree import check_tensors, flatten_params, param_specs
from gdn2_jax.model.config import ModelConfig

CONFIGS = {"official": official, "fla": fla}
_FLOATS = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Opened:
  """A model of any dialect, checked and not read yet.

  Attributes:
    path: of the weights.
    config: of the model; param_dtype is that of its tensors, float32 if they
      differ.
    tensors: by our names, in the dtypes that were stored.
    read: tensors of theirs by name, or None where they are ours.
    moves: from theirs to ours.
    notes: what is worth a line to the user.
    tokenizer: tokenizer.json beside the weights, or None.
  """

  path: pathlib.Path
  config: ModelConfig
  tensors: dict[str, Any]
  read: Mapping[str, Any]
  moves: list[Move]
  notes: list[str]
  tokenizer: pathlib.Path | None


def open_foreign(
  src: pathlib.Path, dialect: Dialect, options: Options
) -> Opened:
  """Checks names, shapes and config of a model of another program.

  Args:
    src: folder with model.safetensors or its shards, or the file.
    dialect: of its names.
    options: see there.

  Raises:
    FileNotFoundError: there is nothing to read.
    ValueError: naming what is missing, unexpected, wrong or unsupported.
  """
  weights = _weights_file(src)
  theirs = _without_prefix(open_tensors(weights), options.strip_prefix, weights)
  if not dialect.recognises(theirs):
    check_names(theirs, [dialect.layer.format(0) + "..."], dialect, weights)
  for name, tensor in theirs.items():
    if str(tensor.dtype) not in _FLOATS:
      raise ValueError(
        f"{weights}: {name} is {tensor.dtype}, expected {', '.join(_FLOATS)}"
      )
  notes: list[str] = []
  values, where = _config_values(weights.parent / folder.CONFIG, options, notes)
  claims = Claims(values, where)
  _tie(theirs, claims, dialect, weights, options, notes)
  shown = look_at(dialect, theirs)
  _check_whole(shown, dialect, theirs, weights)
  gate = agree_on_gate(dialect, claims, options)
  order = _conv_order(claims, options)
  module = CONFIGS[dialect.name]
  config = module.read_config(claims, shown, gate)
  claims.finish(module.HARMLESS, options.ignored)
  config = dataclasses.replace(config, **_dtypes(theirs, notes))
  config.validate()

  kda = None
  if shown.kda:
    kda = KDA(shown.heads or config.gdn2.num_heads)
    notes.append("Kimi Delta Attention, as GDN-2 with tied gates")
  plan = moves(dialect, config, conv_order=order, kda=kda)
  expected = [name for move in plan for name in move.theirs]
  check_names(theirs, expected, dialect, weights)
  shapes = {n: tuple(s.shape) for n, s in param_specs(config).items()}
  ours = to_ours(theirs, plan, shapes, weights)
  assert ours.keys() == shapes.keys(), ours.keys() ^ shapes.keys()
  if options.preset:
    _check_count(options.preset, ours)
  tokenizer = weights.parent / folder.TOKENIZER
  return Opened(
    path=weights,
    config=config,
    tensors={name: ours[name] for name in shapes},
    read=theirs,
    moves=plan,
    notes=notes,
    tokenizer=tokenizer if tokenizer.is_file() else None,
  )


def agree_on_gate(dialect: Dialect, claims: Claims, options: Options) -> str:
  """The activation of the output gate, which no tensor tells.

  Raises:
    ValueError: the dialect's program, the config and the user do not agree.
  """
  told = claims.raw("output_gate")
  if told is not None and told not in OUTPUT_GATES:
    claims.refuse("output_gate", " or ".join(OUTPUT_GATES))
  stated = options.output_gate
  if stated is not None and told not in (None, stated):
    claims.refuse("output_gate", f"{stated!r}, as --output_gate says")
  if stated is None and told not in (None, dialect.output_gate):
    claims.refuse(
      "output_gate",
      f"{dialect.output_gate!r}, which is what the dialect {dialect.name!r} "
      f"computes; if it is right, pass --output_gate={told}",
    )
  return stated or dialect.output_gate


def _without_prefix(
  tensors: Mapping[str, Any], prefix: str, path: pathlib.Path
) -> dict[str, Any]:
  for name in tensors:
    if not name.startswith(prefix):
      raise ValueError(f"{path}: {name}: expected --strip_prefix={prefix}")
  return {name.removeprefix(prefix): t for name, t in tensors.items()}


def _weights_file(src: pathlib.Path) -> pathlib.Path:
  if not src.exists():
    raise FileNotFoundError(f"--src={src}: no such file or folder")
  if not src.is_dir():
    return src
  try:
    return find_weights(src)
  except FileNotFoundError:
    pickles = sorted(p for p in src.iterdir() if p.suffix in _PICKLES)
    if pickles:
      return pickles[0]  # refused by name, with the way to convert it
    others = sorted(src.glob("*.safetensors"))
    if len(others) == 1:
      return others[0]
    raise


_PICKLES = (".pth", ".pt", ".bin", ".ckpt")


def _config_values(
  beside: pathlib.Path, options: Options, notes: list[str]
) -> tuple[dict[str, Any], str]:
  """Keys of the config and where they come from."""
  values: dict[str, Any] = {}
  where = f"{beside} (not there)"
  if options.preset:
    values, _ = official.PRESETS[options.preset]
    where = f"--preset={options.preset}"
    if beside.exists():
      notes.append(f"{beside.name} passed over for {where}")
  elif options.config or beside.exists():
    path = pathlib.Path(options.config or beside)
    values, where = read_json(path), str(path)
  if options.values:
    values = dict(values) | dict(options.values)
    where += " and --set"
  return values, where


def _tie(theirs, claims, dialect, weights, options, notes) -> None:
  """Gives a model without a head that of its embedding, if it may."""
  names = {ours: name for ours, name, _ in dialect.model}
  head, table = names["head"], names["embedding.table"]
  tied = claims.boolean("tie_word_embeddings", False)
  if head in theirs:
    if tied:
      claims.refuse("tie_word_embeddings", f"false, as there is {head}")
    if options.untie_head:
      raise ValueError(f"--untie_head: {weights} has a head of its own, {head}")
    return
  if not options.untie_head:
    raise ValueError(
      f"{weights}: {head} is missing. If the head is the embedding, pass "
      "--untie_head: ours is one of its own, and starts as a copy"
    )
  if table in theirs:
    theirs[head] = theirs[table]
    notes.append(f"{head}: a copy of {table}, no longer tied to it")


def _check_whole(shown: Shown, dialect, theirs, weights) -> None:
  """Refuses layers that are not there."""
  present = dialect.layer_names(theirs)
  absent = [n for n in range(len(shown.kinds)) if n not in present]
  if absent:
    raise ValueError(
      f"{weights}: {len(shown.kinds)} layers, of which {len(absent)} are "
      f"missing, the first is {dialect.layer.format(absent[0])}*"
    )


def _conv_order(claims: Claims, options: Options) -> str:
  told = claims.raw("conv_order")
  claims.only("conv_order", "oldest_first", "newest_first")
  stated = options.from_conv_order
  if stated is not None and told not in (None, stated):
    claims.refuse("conv_order", f"{stated!r}, as --from_conv_order says")
  return stated or told or "oldest_first"


def _dtypes(theirs: Mapping[str, Any], notes: list[str]) -> dict[str, str]:
  """dtype and param_dtype of the model."""
  kept = {n: t for n, t in theirs.items() if n.split(".")[-1] in FLOAT32}
  rounded = sorted({str(t.dtype) for t in kept.values()} - {"float32"})
  if rounded:
    notes.append(
      f"A_log and dt_bias were stored in {', '.join(rounded)}: widened to "
      "float32, what rounding lost stays lost"
    )
  rest = {str(t.dtype) for name, t in theirs.items() if name not in kept}
  dtype = rest.pop() if len(rest) == 1 else "float32"
  return {"dtype": dtype, "param_dtype": dtype}


def _check_count(preset: str, ours: Mapping[str, Lazy]) -> None:
  found = sum(int(np.prod(tensor.shape)) for tensor in ours.values())
  _, expected = official.PRESETS[preset]
  if found != expected:
    raise ValueError(
      f"--preset={preset}: {found:,} parameters, expected {expected:,}"
    )


def open_ours(src: pathlib.Path, options: Options) -> Opened:
  """A published-model folder, or the workdir of a training run.

  Raises:
    FileNotFoundError: no such folder.
    ValueError: it is neither, or damaged.
  """
  if not src.is_dir():
    raise FileNotFoundError(f"--src={src}: no such folder")
  notes: list[str] = []
  if (src / "checkpoints").is_dir():
    config, tensors, step = _load_run(src, options)
    notes.append(f"checkpoint of step {step}")
  else:
    if options.step is not None:
      raise ValueError(f"--step={options.step}: {src} is not a workdir")
    folder.verify(src, folder.read_manifest(src))
    config = folder.read_config(src / folder.CONFIG)
    tensors = open_tensors(find_weights(src))
    check_tensors(tensors, param_specs(config), str(src))
  if options.output_gate not in (None, config.gdn2.output_gate):
    raise ValueError(
      f"--output_gate={options.output_gate}: the model in {src} has "
      f"{config.gdn2.output_gate!r}"
    )
  tokenizer = src / folder.TOKENIZER
  return Opened(
    path=src,
    config=config,
    tensors=tensors,
    read=tensors,
    moves=[],
    notes=notes,
    tokenizer=tokenizer if tokenizer.is_file() else None,
  )


def _load_run(src: pathlib.Path, options: Options):
  # Not at the top: only this needs orbax, which takes seconds to import.
  from gdn2_jax.train.checkpoint.manager import load_run

  run = load_run(src, options.step)
  return (
    run.config.model,
    flatten_params(run.params, run.config.model),
    run.step,
  )
