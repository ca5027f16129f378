"""Models of any dialect, opened under our parameter names."""

import dataclasses
import math
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from gdn2_jax.interop import folder, hf
from gdn2_jax.interop.convert import fla, official
from gdn2_jax.interop.convert.claims import Claims, look_at
from gdn2_jax.interop.convert.options import (
  DTYPES,
  HF,
  OURS,
  OUTPUT_GATES,
  Options,
)
from gdn2_jax.interop.convert.tensors import check_dialect, to_ours
from gdn2_jax.interop.disk import read_json
from gdn2_jax.interop.layouts import CONV_ORDERS
from gdn2_jax.interop.names import (
  DIALECTS,
  FLOAT32,
  KDA,
  RECURRENT,
  Dialect,
  Move,
  moves,
)
from gdn2_jax.interop.tensors import find_weights, open_tensors
from gdn2_jax.interop.tree import (
  flatten_params,
  float32_names,
  param_specs,
)
from gdn2_jax.model.config import ModelConfig

CONFIGS = {"official": official, "fla": fla}


@dataclasses.dataclass(frozen=True)
class Opened:
  """A model of any dialect, checked and not read yet."""

  path: pathlib.Path  # of the weights
  config: ModelConfig
  tensors: Mapping[str, Any]  # by our names, in the dtypes that were stored
  read: Mapping[str, Any]  # the same tensors by their names
  moves: list[Move]  # from theirs to ours, [] where they are ours
  notes: list[str]  # lines for the user
  tokenizer: pathlib.Path | None  # tokenizer.json beside the weights


def open_model(src: pathlib.Path, source: str, options: Options) -> Opened:
  """Opens and checks a model of any dialect."""
  if source == OURS:
    return _open_ours(src, options)
  if source == HF:
    return _open_hf(src, options)
  return _open_foreign(src, DIALECTS[source], options)


def _open_foreign(
  src: pathlib.Path, dialect: Dialect, options: Options
) -> Opened:
  """Checks names, shapes and config of a model of another program."""
  if not src.exists():
    raise FileNotFoundError(f"--src={src}: no such file or folder")
  weights = find_weights(src) if src.is_dir() else src
  theirs, prefix = {}, options.strip_prefix
  for name, tensor in open_tensors(weights).items():
    if not name.startswith(prefix):
      raise ValueError(f"{weights}: {name}: expected --strip_prefix={prefix}")
    if str(tensor.dtype) not in DTYPES:
      raise ValueError(
        f"{weights}: {name} is {tensor.dtype}, expected {', '.join(DTYPES)}"
      )
    theirs[name.removeprefix(prefix)] = tensor
  check_dialect(theirs, dialect, weights)
  notes: list[str] = []
  claims = _read_claims(weights.parent / folder.CONFIG, options, notes)
  _tie(theirs, claims, dialect, weights, options, notes)
  shown = look_at(dialect, theirs, weights)
  if options.as_mixer:
    shown = dataclasses.replace(shown, recurrent=RECURRENT[options.as_mixer])
    if shown.recurrent == KDA and not shown.kda:
      raise ValueError(
        f"--as={options.as_mixer}: {weights} has no Kimi Delta Attention"
      )
  gate = _output_gate(dialect, claims, options)
  order = _agreed(claims, "conv_order", CONV_ORDERS, options.from_conv_order)
  module = CONFIGS[dialect.name]
  config = module.read_config(claims, shown, gate)
  if unread := claims.finish(options.ignored, module.HARMLESS):
    notes.append(f"keys of the config that were not read: {', '.join(unread)}")
  kept = {n for n in theirs if n.split(".")[-1] in FLOAT32}
  config = dataclasses.replace(config, **_dtypes(theirs, kept, notes))
  config.validate()

  kda_heads = None
  if shown.kda:
    kda_heads = shown.heads or config.gdn2.num_heads
    notes.append(
      "Kimi Delta Attention"
      if shown.recurrent == KDA
      else "Kimi Delta Attention, as GDN-2 with tied gates; --as=kda keeps it"
    )
  plan = moves(
    dialect, config, conv_order=order or "oldest_first", kda_heads=kda_heads
  )
  shapes = {n: tuple(s.shape) for n, s in param_specs(config).items()}
  ours = to_ours(theirs, plan, shapes, weights)
  assert ours.keys() == shapes.keys(), ours.keys() ^ shapes.keys()
  if options.preset:
    found = sum(math.prod(shape) for shape in shapes.values())
    _, count = official.PRESETS[options.preset]
    if found != count:
      raise ValueError(
        f"--preset={options.preset}: {found:,} parameters, expected {count:,}"
      )
  return Opened(
    path=weights,
    config=config,
    tensors={name: ours[name] for name in shapes},
    read=theirs,
    moves=plan,
    notes=notes,
    tokenizer=_tokenizer(weights.parent),
  )


def _output_gate(dialect: Dialect, claims: Claims, options: Options) -> str:
  """Activation of the output gate by dialect, config and user, who agree."""
  found = _agreed(claims, "output_gate", OUTPUT_GATES, options.output_gate)
  if options.output_gate is None and found not in (None, dialect.output_gate):
    claims.refuse(
      "output_gate",
      f"{dialect.output_gate!r}, which is what the dialect {dialect.name!r} "
      f"computes; if it is right, pass --output_gate={found}",
    )
  return found or dialect.output_gate


def _agreed(
  claims: Claims, key: str, choices: Sequence[str], stated: str | None
) -> str | None:
  """A choice by the config or the user; where both choose, they must agree."""
  claims.only(key, None, *choices)
  told = claims.raw(key)
  if None not in (told, stated) and told != stated:
    claims.refuse(key, f"{stated!r}, as the options say")
  return stated or told


def _read_claims(
  beside: pathlib.Path, options: Options, notes: list[str]
) -> Claims:
  """Keys of the config, from a file, a preset and the user."""
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
  return Claims(values, where)


def _tie(theirs, claims, dialect, weights, options, notes) -> None:
  """Copies the embedding to a head that is missing, with --untie_head."""
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


def _dtypes(
  theirs: Mapping[str, Any], kept: Collection[str], notes: list[str]
) -> dict[str, str]:
  """Fields dtype and param_dtype: that of the tensors, float32 if several.

  Args:
    theirs: tensors by their names.
    kept: names of those that are float32 in every model.
    notes: gets a line if they are not.
  """
  rounded = sorted({str(theirs[n].dtype) for n in kept} - {"float32"})
  if rounded:
    notes.append(
      f"A_log and dt_bias were stored in {', '.join(rounded)}: widened to "
      "float32, what rounding lost stays lost"
    )
  rest = {str(t.dtype) for name, t in theirs.items() if name not in kept}
  dtype = rest.pop() if len(rest) == 1 else "float32"
  return {"dtype": dtype, "param_dtype": dtype}


def _open_ours(src: pathlib.Path, options: Options) -> Opened:
  """Opens a published-model folder, or the workdir of a training run."""
  if not src.is_dir():
    raise FileNotFoundError(f"--src={src}: no such folder")
  notes: list[str] = []
  if (src / "checkpoints").is_dir():
    # Not at the top: only this needs orbax, which takes seconds to import.
    from gdn2_jax.train.checkpoint import load_run

    run = load_run(src, options.step)
    config = run.config.model
    tensors = flatten_params(run.params, config)
    notes.append(f"checkpoint of step {run.step}")
  else:
    if options.step is not None:
      raise ValueError(f"--step={options.step}: {src} is not a workdir")
    config, tensors = folder.open_folder(src)
  _check_stated_gate(src, config, options)
  return Opened(
    path=src,
    config=config,
    tensors=tensors,
    read=tensors,
    moves=[],
    notes=notes,
    tokenizer=_tokenizer(src),
  )


def _open_hf(src: pathlib.Path, options: Options) -> Opened:
  """Opens a folder for transformers, ours or saved again by it."""
  if not src.is_dir():
    raise FileNotFoundError(f"--src={src}: no such folder")
  path = src / folder.CONFIG
  config = hf.read_config(read_json(path), path)
  weights = find_weights(src)
  theirs = open_tensors(weights)
  plan = hf.moves(config)
  shapes = {n: tuple(s.shape) for n, s in param_specs(config).items()}
  ours = to_ours(theirs, plan, shapes, weights)
  notes: list[str] = []
  fixed = float32_names(config)
  kept = {move.theirs for move in plan if move.ours[0] in fixed}
  param_dtype = _dtypes(theirs, kept, notes)["param_dtype"]
  config = dataclasses.replace(config, param_dtype=param_dtype)
  config.validate()
  _check_stated_gate(src, config, options)
  return Opened(
    path=src,
    config=config,
    tensors=ours,
    read=theirs,
    moves=plan,
    notes=notes,
    tokenizer=_tokenizer(src),
  )


def _check_stated_gate(
  src: pathlib.Path, config: ModelConfig, options: Options
) -> None:
  """Refuses an output gate that is not that of the config."""
  if options.output_gate not in (None, config.gdn2.output_gate):
    raise ValueError(
      f"--output_gate={options.output_gate}: the model in {src} has "
      f"{config.gdn2.output_gate!r}"
    )


def _tokenizer(beside: pathlib.Path) -> pathlib.Path | None:
  path = beside / folder.TOKENIZER
  return path if path.is_file() else None
