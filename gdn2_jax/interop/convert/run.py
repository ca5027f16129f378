"""Conversion: opens and checks everything, then writes tensor by tensor."""

import dataclasses
import functools
import os
import pathlib
from typing import Any

import numpy as np
import tqdm

from gdn2_jax.data.tokenizer.api import BPETokenizer, load_tokenizer
from gdn2_jax.data.tokenizer.base import Tokenizer
from gdn2_jax.files import write_atomically
from gdn2_jax.interop import hf
from gdn2_jax.interop.card import Card
from gdn2_jax.interop.convert.opened import CONFIGS, Opened, open_model
from gdn2_jax.interop.convert.options import HF, OURS, Options
from gdn2_jax.interop.convert.probe import Probe, check_probe
from gdn2_jax.interop.convert.report import Report
from gdn2_jax.interop.convert.tensors import in_dtype, to_theirs
from gdn2_jax.interop.disk import json_bytes
from gdn2_jax.interop.folder import (
  CONFIG,
  TOKENIZER,
  check_target,
  move_files,
  save_model,
  staged,
)
from gdn2_jax.interop.header import Lazy
from gdn2_jax.interop.names import (
  DIALECTS,
  KDA,
  check_letters,
  moves,
  recurrent_letters,
)
from gdn2_jax.interop.tensors import SHARD_BYTES, save_shards
from gdn2_jax.interop.tree import listed, unflatten_params
from gdn2_jax.model.config import ModelConfig

_METADATA = {"format": "pt"}  # loaders of these folders ask for it
_PROGRESS_BYTES = 1 << 28  # smaller models are written before one can read it


def convert(
  src: str | os.PathLike,
  out: str | os.PathLike,
  *,
  source: str,
  target: str,
  options: Options = Options(),  # noqa: B008, frozen
  probe: Probe | None = None,
  max_shard_bytes: int = SHARD_BYTES,
) -> Report:
  """Rewrites a model in the names and layouts of another program.

  Only permutes: every number is kept bit for bit, unless `options.dtype` asks
  for another one. Nothing is written before everything has been checked.

  Args:
    src: folder with the weights, or their *.safetensors file; for "gdn2_jax" a
      published-model folder or the workdir of a training run.
    out: folder to write, absent or empty.
    source: dialect of `src`: "official", "fla", "hf" or "gdn2_jax".
    target: dialect of `out`.
    options: facts that the files lack, and permissions.
    probe: tokens and logits that must fit the vocabulary of the model.
    max_shard_bytes: size above which the weights become several files.

  Returns:
    Report of what was read and written; `str` of it is a table.

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
  if probe is not None:
    check_probe(probe, opened.config)
  if target in DIALECTS:
    _check_gate(opened.config, target, options)
  config, dtype = opened.config, options.dtype
  if dtype:
    config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
  elif target not in DIALECTS:
    dtype = config.param_dtype  # one for all
  written, plan = in_dtype(opened.tensors, dtype, config), []
  if target == HF:
    plan = hf.moves(config)
    written = to_theirs(written, plan)
  elif target != OURS:
    order = options.to_conv_order or "oldest_first"
    plan = moves(DIALECTS[target], config, conv_order=order)
    written = to_theirs(written, plan)
    tree = CONFIGS[target].write_config(config)
    if order != "oldest_first":
      tree["conv_order"] = order

  notes, bad = list(opened.notes), {}
  tokenizer = _load_tokenizer(opened, target, notes)
  card = Card(facts={"converted from": opened.path.name})
  files: dict[str, bytes] = {}  # config.json last: without it nothing loads
  if target == HF:
    files = hf.folder_files(config, tokenizer, card, name=out.absolute().name)
  elif target != OURS:
    files = {CONFIG: json_bytes(tree)}
    if tokenizer is not None:
      files = {TOKENIZER: opened.tokenizer.read_bytes()} | files
  total = sum(tensor.nbytes for tensor in written.values())
  # None: only on a terminal.
  disable = None if total >= _PROGRESS_BYTES else True
  with tqdm.tqdm(
    total=total, unit="B", unit_scale=True, disable=disable
  ) as bar:
    watched = {
      name: dataclasses.replace(
        tensor, read=functools.partial(_read, name, tensor, bar, bad)
      )
      for name, tensor in written.items()
    }
    if target == OURS:
      # Layers that are not stacked: one copy of each, which is the one written.
      unstacked = dataclasses.replace(config, scan_layers=False)
      save_model(
        out,
        unflatten_params(watched, unstacked, place=lambda array: array),
        config,
        tokenizer,
        card=card,
        max_shard_bytes=max_shard_bytes,
      )
    else:
      with staged(out) as staging:
        names = save_shards(
          staging, watched, _METADATA, max_bytes=max_shard_bytes
        )
        for name, data in files.items():
          write_atomically(staging / name, data)
        move_files(staging, out, [*names, *files])
  if bad:
    counts = [f"{count:,} in {name}" for name, count in bad.items()]
    notes.append(f"values that are not finite (kept): {listed(counts)}")
  found = sorted(path.name for path in out.iterdir())
  return Report(source, target, opened, written, plan, found, notes)


def _check_gate(config: ModelConfig, target: str, options: Options) -> None:
  """Refuses to write what the other program would compute differently."""
  check_letters(DIALECTS[target], config)
  if not recurrent_letters(config.pattern):
    return
  c, theirs = config.gdn2, DIALECTS[target].output_gate
  if c.output_gate != theirs and options.output_gate is None:
    raise ValueError(
      f"output_gate={c.output_gate!r}: programs of the dialect {target!r} "
      f"compute {theirs!r} and would load these weights without complaint; to "
      f"write them all the same, pass --output_gate={c.output_gate}"
    )
  # Those of a letter that implies others were checked against its own.
  for name, only in (
    ("gates", "decoupled"),
    ("erase_gate", "channel"),
    ("write_gate", "channel"),
    ("decay", "channel"),
  ):
    tied = KDA in config.pattern and name == "gates"
    if getattr(c, name) != only and not tied:
      raise ValueError(
        f"{name}={getattr(c, name)!r}: expected {only!r}, as the dialect "
        f"{target!r} has no other"
      )


def _read(name: str, tensor: Lazy, bar: tqdm.tqdm, bad: dict[str, int]) -> Any:
  """Reads a tensor, shows progress and counts numbers that are not finite."""
  value = np.asarray(tensor)
  bar.update(value.nbytes)
  if count := value.size - int(np.count_nonzero(np.isfinite(value))):
    bad[name] = count
  return value


def _load_tokenizer(
  opened: Opened, target: str, notes: list[str]
) -> Tokenizer | None:
  """The tokenizer beside the weights, unless the target cannot read it."""
  if opened.tokenizer is None:
    return None
  try:
    tokenizer = load_tokenizer(opened.tokenizer)
    if tokenizer.vocab_size > opened.config.vocab_size:
      reason = f"{tokenizer.vocab_size} ids, more than the model has"
    elif target in DIALECTS and not isinstance(tokenizer, BPETokenizer):
      reason = "other programs cannot read it"
    elif target == HF and hf.tokenizer_json(tokenizer) is None:
      reason = "transformers cannot read it"
    else:
      return tokenizer
  except ValueError as e:
    reason = str(e)
  notes.append(f"tokenizer.json left behind: {reason}")
  return None
