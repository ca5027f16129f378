"""Models of any dialect, opened under our parameter names."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from gdn2_jax.interop import folder
from gdn2_jax.interop.convert import fla, official
from gdn2_jax.interop.convert.claims import Claims, Shown, look_at
from gdn2_jax.interop.convert.options import DTYPES, OUTPUT_GATES, Options
from gdn2_jax.interop.convert.tensors import check_names, to_ours
from gdn2_jax.interop.disk import PICKLES, read_json
from gdn2_jax.interop.names import FLOAT32, Dialect, Move, moves
from gdn2_jax.interop.tensors import find_weights, open_tensors
from gdn2_jax.interop.tree import check_tensors, flatten_params, param_specs
from gdn2_jax.model.config import ModelConfig

CONFIGS = {"official": official, "fla": fla}


@dataclasses.dataclass(frozen=True)
class Opened:
  """A model of any dialect, checked and not read yet."""

  path: pathlib.Path  # of the weights
  config: ModelConfig  # param_dtype is that of the tensors, float32 if several
  tensors: Mapping[str, Any]  # by our names, in the dtypes that were stored
  read: Mapping[str, Any]  # the same tensors by their names
  moves: list[Move]  # from theirs to ours, [] where they are ours
  notes: list[str]  # lines for the user
  tokenizer: pathlib.Path | None  # tokenizer.json beside the weights


def open_foreign(
  src: pathlib.Path, dialect: Dialect, options: Options
) -> Opened:
  """Checks names, shapes and config of a model of another program."""
  weights = _weights_file(src)
  theirs, prefix = {}, options.strip_prefix
  for name, tensor in open_tensors(weights).items():
    if not name.startswith(prefix):
      raise ValueError(f"{weights}: {name}: expected --strip_prefix={prefix}")
    if str(tensor.dtype) not in DTYPES:
      raise ValueError(
        f"{weights}: {name} is {tensor.dtype}, expected {', '.join(DTYPES)}"
      )
    theirs[name.removeprefix(prefix)] = tensor
  if not dialect.recognises(theirs):
    check_names(theirs, [dialect.layer.format(0) + "..."], dialect, weights)
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
  if unread := claims.finish(options.ignored, module.HARMLESS):
    notes.append(f"keys of the config that were not read: {', '.join(unread)}")
  config = dataclasses.replace(config, **_dtypes(theirs, notes))
  config.validate()

  kda_heads = None
  if shown.kda:
    kda_heads = shown.heads or config.gdn2.num_heads
    notes.append("Kimi Delta Attention, as GDN-2 with tied gates")
  plan = moves(dialect, config, conv_order=order, kda_heads=kda_heads)
  check_names(theirs, [move.theirs for move in plan], dialect, weights)
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


def agree_on_gate(dialect: Dialect, claims: Claims, options: Options) -> str:
  """Activation of the output gate by dialect, config and user, who agree."""
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


def _weights_file(src: pathlib.Path) -> pathlib.Path:
  if not src.exists():
    raise FileNotFoundError(f"--src={src}: no such file or folder")
  if not src.is_dir():
    return src
  try:
    return find_weights(src)
  except FileNotFoundError:
    pickles = sorted(p for p in src.iterdir() if p.suffix.lower() in PICKLES)
    if pickles:
      return pickles[0]  # refused by name, with the way to convert it
    others = sorted(src.glob("*.safetensors"))
    if len(others) == 1:
      return others[0]
    raise


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


def open_ours(src: pathlib.Path, options: Options) -> Opened:
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
    folder.verify(src, folder.read_manifest(src))
    config = folder.read_config(src / folder.CONFIG)
    tensors = open_tensors(find_weights(src))
    check_tensors(tensors, param_specs(config), str(src))
  if options.output_gate not in (None, config.gdn2.output_gate):
    raise ValueError(
      f"--output_gate={options.output_gate}: the model in {src} has "
      f"{config.gdn2.output_gate!r}"
    )
  return Opened(
    path=src,
    config=config,
    tensors=tensors,
    read=tensors,
    moves=[],
    notes=notes,
    tokenizer=_tokenizer(src),
  )


def _tokenizer(beside: pathlib.Path) -> pathlib.Path | None:
  path = beside / folder.TOKENIZER
  return path if path.is_file() else None
