"""Conversion: opens and checks everything, then writes tensor by tensor."""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import tqdm

from gdn2_jax.data.files import sync_folder, write_atomically
from gdn2_jax.data.tokenizer.api import BPETokenizer, load_tokenizer
from gdn2_jax.interop.card import Card
from gdn2_jax.interop.convert.opened import (
  CONFIGS,
  Opened,
  open_foreign,
  open_ours,
)
from gdn2_jax.interop.convert.options import OURS, Options
from gdn2_jax.interop.convert.report import Report
from gdn2_jax.interop.convert.tensors import in_dtype, to_theirs, watched
from gdn2_jax.interop.folder import (
  CONFIG,
  TOKENIZER,
  check_target,
  save_model,
  staged,
)
from gdn2_jax.interop.names import DIALECTS, moves
from gdn2_jax.interop.tensors import SHARD_BYTES, save_shards
from gdn2_jax.interop.tree import unflatten_params
from gdn2_jax.model.config import ModelConfig

_METADATA = {"format": "pt"}  # loaders of these folders ask for it
_PROGRESS_BYTES = 1 << 28  # smaller models are written before one can read it
_SHOWN = 4


def convert(
  src: str | os.PathLike,
  out: str | os.PathLike,
  *,
  source: str,
  target: str,
  options: Options = Options(),  # noqa: B008, frozen
  max_shard_bytes: int = SHARD_BYTES,
) -> Report:
  """Rewrites a model in the names and layouts of another program.

  Only permutes: every number is kept bit for bit, unless `options.dtype` asks
  for another one. Nothing is written before everything has been checked.

  Args:
    src: folder with the weights, or their *.safetensors file; for "gdn2_jax" a
      published-model folder or the workdir of a training run.
    out: folder to write, absent or empty.
    source: dialect of `src`: "official", "fla" or "gdn2_jax".
    target: dialect of `out`.
    options: what the files do not tell.
    max_shard_bytes: of one weights file.

  Returns:
    What was read and written; `str` of it is a table.

  Raises:
    FileNotFoundError: there is nothing at `src`.
    ValueError: naming what is wrong with the source, the options or `out`.
  """
  options.check(source, target)
  src, out = pathlib.Path(src), pathlib.Path(out)
  if out.resolve() == (src.parent if src.is_file() else src).resolve():
    raise ValueError(f"--out={out}: the folder of --src={src}")
  check_target(out, overwrite=False)
  opened = open_model(src, source, options)
  _check_gate(opened.config, target, options)
  config, dtype = opened.config, None
  if options.dtype:
    dtype = options.dtype
    config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
  elif target == OURS:
    dtype = config.param_dtype  # one for all
  written = tensors = in_dtype(opened.tensors, dtype)
  names = {name: (name, name) for name in tensors}
  for move in opened.moves:
    names |= {name: (move.theirs, name) for name in move.ours}
  if target != OURS:
    order = options.to_conv_order or "oldest_first"
    plan = moves(DIALECTS[target], config, conv_order=order)
    written = to_theirs(tensors, plan)
    for move in plan:
      names |= {name: (names[name][0], move.theirs) for name in move.ours}
    tree = CONFIGS[target].write_config(config)
    if order != "oldest_first":
      tree["conv_order"] = order

  notes, bad = list(opened.notes), {}
  tokenizer = _load_tokenizer(opened, target, notes)
  total = sum(tensor.nbytes for tensor in written.values())
  # None: only on a terminal.
  disable = None if total >= _PROGRESS_BYTES else True
  with tqdm.tqdm(
    total=total, unit="B", unit_scale=True, disable=disable
  ) as bar:
    watching = {
      name: watched(tensor, functools.partial(_count, bar, bad, name))
      for name, tensor in written.items()
    }
    if target == OURS:
      # Layers that are not stacked: one copy of each, which is the one written.
      unstacked = dataclasses.replace(config, scan_layers=False)
      save_model(
        out,
        unflatten_params(watching, unstacked, place=lambda array: array),
        config,
        tokenizer,
        card=Card(facts={"converted from": opened.path.name}),
        max_shard_bytes=max_shard_bytes,
      )
      files = sorted(path.name for path in out.iterdir())
    else:
      files = _save_theirs(out, watching, tree, tokenizer, max_shard_bytes)
  notes += [
    f"{name}: {count:,} values are not finite (kept)"
    for name, count in list(bad.items())[:_SHOWN]
  ]
  if len(bad) > _SHOWN:
    notes.append(f"{len(bad)} tensors with values that are not finite")
  return Report(source, target, opened, written, names, files, notes)


def open_model(src: pathlib.Path, source: str, options: Options) -> Opened:
  """Opens and checks a model of any dialect."""
  if source == OURS:
    return open_ours(src, options)
  return open_foreign(src, DIALECTS[source], options)


def _check_gate(config: ModelConfig, target: str, options: Options) -> None:
  """Refuses to write what the other program would compute differently."""
  if target == OURS or "G" not in config.pattern:
    return
  c, theirs = config.gdn2, DIALECTS[target].output_gate
  if c.output_gate != theirs and options.output_gate is None:
    raise ValueError(
      f"output_gate={c.output_gate!r}: programs of the dialect {target!r} "
      f"compute {theirs!r} and would load these weights without complaint; to "
      f"write them all the same, pass --output_gate={c.output_gate}"
    )
  for name in ("erase_gate", "write_gate"):
    if getattr(c, name) != "channel":
      raise ValueError(
        f"{name}={getattr(c, name)!r}: the dialect {target!r} has gates of "
        "channels only"
      )


def _count(bar: tqdm.tqdm, bad: dict[str, int], name: str, value) -> None:
  """Shows progress, and counts numbers that are not finite; they are kept."""
  bar.update(value.nbytes)
  if count := value.size - int(np.count_nonzero(np.isfinite(value))):
    bad[name] = count


def _load_tokenizer(opened: Opened, target: str, notes: list[str]) -> Any:
  """The tokenizer beside the weights, unless the target cannot read it."""
  if opened.tokenizer is None:
    return None
  try:
    tokenizer = load_tokenizer(opened.tokenizer)
    if tokenizer.vocab_size > opened.config.vocab_size:
      reason = f"{tokenizer.vocab_size} ids, more than the model has"
    elif target != OURS and not isinstance(tokenizer, BPETokenizer):
      reason = "other programs cannot read it"
    else:
      return tokenizer if target == OURS else opened.tokenizer.read_bytes()
  except ValueError as e:
    reason = str(e)
  notes.append(f"tokenizer.json left behind: {reason}")
  return None


def _save_theirs(
  out: pathlib.Path,
  tensors: Mapping[str, Any],
  tree: dict[str, Any],
  tokenizer: bytes | None,
  max_shard_bytes: int,
) -> list[str]:
  """Writes a folder of another program: all of its files or none."""
  with staged(out) as staging:
    files = save_shards(staging, tensors, _METADATA, max_bytes=max_shard_bytes)
    if tokenizer is not None:
      write_atomically(staging / TOKENIZER, tokenizer)
      files.append(TOKENIZER)
    write_atomically(
      staging / CONFIG, (json.dumps(tree, indent=2) + "\n").encode()
    )
    files.append(CONFIG)
    for name in files:  # the config last: without it nothing loads
      os.replace(staging / name, out / name)
    sync_folder(out)
  return files
