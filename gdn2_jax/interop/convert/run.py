"""One conversion: open and check everything, then write tensor by tensor."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import uuid
from typing import Any

import numpy as np
import tqdm

from gdn2_jax.data.files import sync_folder, write_atomic
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
from gdn2_jax.interop.convert.tensors import Lazy, in_dtype, to_theirs, watched
from gdn2_jax.interop.folder import CONFIG, TOKENIZER, save_model
from gdn2_jax.interop.names import DIALECTS, moves
from gdn2_jax.interop.tensors import SHARD_BYTES, save_shards
from gdn2_jax.interop.tree import unflatten_params
from gdn2_jax.model.config import ModelConfig

_METADATA = {"format": "pt"}  # what loaders of these folders ask for
_PROGRESS_BYTES = 1 << 28  # below this it is over before one can read it
_SHOWN = 4
_STAGING = ".incoming-"


def convert(
  src: str | os.PathLike,
  out: str | os.PathLike,
  *,
  source: str,
  target: str,
  options: Options = Options(),  # noqa: B008, frozen
  max_shard_bytes: int = SHARD_BYTES,
) -> Report:
  """Rewrites a model under the names and in the layouts of another program.

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
  _check_out(src, out)
  opened = open_model(src, source, options)
  _check_gate(opened.config, target, options)
  config, tensors = _with_dtypes(opened, target, options)
  notes = list(opened.notes)
  names = {name: ((name,), (name,)) for name in tensors}
  for move in opened.moves:
    names |= {name: (move.theirs, (name,)) for name in move.ours}
  written: dict[str, Any] = tensors
  if target != OURS:
    order = options.to_conv_order or "oldest_first"
    plan = moves(DIALECTS[target], config, conv_order=order)
    written = to_theirs(tensors, plan)
    for move in plan:
      names |= {name: (names[name][0], move.theirs) for name in move.ours}
    tree = _their_config(config, target, order)

  counter = _Counter(written)
  watching = {n: counter.watch(n, t) for n, t in written.items()}
  with counter:
    if target == OURS:
      files = _save_ours(out, watching, config, opened, notes, max_shard_bytes)
    else:
      tokenizer = _their_tokenizer(opened, notes)
      files = _save_theirs(out, watching, tree, tokenizer, max_shard_bytes)
  notes += counter.notes()
  return Report(source, target, opened, written, names, files, notes)


def open_model(src: pathlib.Path, source: str, options: Options) -> Opened:
  """Opens a model of any dialect; see `open_foreign` and `open_ours`."""
  if source == OURS:
    return open_ours(src, options)
  return open_foreign(src, DIALECTS[source], options)


def _check_out(src: pathlib.Path, out: pathlib.Path) -> None:
  if out.resolve() == (src.parent if src.is_file() else src).resolve():
    raise ValueError(f"--out={out}: the folder of --src={src}")
  if out.exists() and not out.is_dir():
    raise ValueError(f"--out={out}: a file, expected a folder")
  if out.exists() and any(
    not path.name.startswith(_STAGING) for path in out.iterdir()
  ):
    raise ValueError(f"--out={out}: not empty, expected a new folder")


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


def _with_dtypes(
  opened: Opened, target: str, options: Options
) -> tuple[ModelConfig, dict[str, Lazy]]:
  """The config and the tensors, in the dtypes to write."""
  config, dtype = opened.config, None
  if options.dtype:
    dtype = options.dtype
    config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
  elif target == OURS:
    dtype = config.param_dtype  # one for all
  return config, in_dtype(opened.tensors, dtype)


def _their_config(
  config: ModelConfig, target: str, conv_order: str
) -> dict[str, Any]:
  tree = CONFIGS[target].write_config(config)
  if conv_order != "oldest_first":
    tree["conv_order"] = conv_order
  return tree


def _save_ours(out, tensors, config, opened, notes, max_shard_bytes):
  tokenizer = _load_tokenizer(opened, notes)
  # Layers that are not stacked: one copy of each, which is the one written.
  unstacked = dataclasses.replace(config, scan_layers=False)
  params = unflatten_params(tensors, unstacked, place=lambda array: array)
  card = Card(facts={"converted from": opened.path.name})
  save_model(
    out, params, config, tokenizer, card=card, max_shard_bytes=max_shard_bytes
  )
  return sorted(path.name for path in out.iterdir())


def _load_tokenizer(opened: Opened, notes: list[str]) -> Any:
  if opened.tokenizer is None:
    return None
  try:
    tokenizer = load_tokenizer(opened.tokenizer)
    if tokenizer.vocab_size <= opened.config.vocab_size:
      return tokenizer
    reason = f"{tokenizer.vocab_size} ids, more than the model has"
  except ValueError as e:
    reason = str(e)
  notes.append(f"tokenizer.json left behind: {reason}")
  return None


def _their_tokenizer(opened: Opened, notes: list[str]) -> bytes | None:
  """tokenizer.json, unless only this program reads it."""
  tokenizer = _load_tokenizer(opened, notes)
  if tokenizer is None:
    return None
  if not isinstance(tokenizer, BPETokenizer):
    notes.append("tokenizer.json left behind: other programs cannot read it")
    return None
  return opened.tokenizer.read_bytes()


def _save_theirs(
  out: pathlib.Path,
  tensors: dict[str, Any],
  tree: dict[str, Any],
  tokenizer: bytes | None,
  max_shard_bytes: int,
) -> list[str]:
  """Writes a folder of another program: all of its files or none."""
  is_new = not out.exists()
  out.mkdir(parents=True, exist_ok=True)
  for abandoned in out.glob(f"{_STAGING}*"):
    shutil.rmtree(abandoned)
  staging = out / f"{_STAGING}{uuid.uuid4().hex[:8]}"
  staging.mkdir()
  try:
    files = save_shards(staging, tensors, _METADATA, max_bytes=max_shard_bytes)
    if tokenizer is not None:
      write_atomic(staging / TOKENIZER, tokenizer)
      files.append(TOKENIZER)
    write_atomic(staging / CONFIG, (json.dumps(tree, indent=2) + "\n").encode())
    files.append(CONFIG)
    for name in files:  # the config last: without it nothing loads
      os.replace(staging / name, out / name)
    sync_folder(out)
  except BaseException:
    shutil.rmtree(staging, ignore_errors=True)
    if is_new:
      with contextlib.suppress(OSError):
        out.rmdir()
    raise
  staging.rmdir()
  return files


class _Counter:
  """Shows progress, and counts what is not finite, as tensors are read."""

  def __init__(self, tensors: dict[str, Any]):
    self._total = sum(tensor.nbytes for tensor in tensors.values())
    self._bad: dict[str, int] = {}
    self._bar: Any = None

  def __enter__(self):
    self._bar = tqdm.tqdm(
      total=self._total,
      unit="B",
      unit_scale=True,
      # None: only where somebody can see it move.
      disable=None if self._total >= _PROGRESS_BYTES else True,
    )

  def __exit__(self, *error):
    self._bar.close()

  def watch(self, name: str, tensor: Any) -> Lazy:
    """The same tensor, counted when it is read."""

    def seen(value: np.ndarray) -> None:
      self._bar.update(value.nbytes)
      bad = value.size - int(np.count_nonzero(np.isfinite(value)))
      if bad:
        self._bad[name] = bad

    return watched(tensor, seen)

  def notes(self) -> list[str]:
    """Lines about numbers that are not finite; they are kept as they are."""
    return [
      f"{name}: {bad:,} values are not finite (kept)"
      for name, bad in list(self._bad.items())[:_SHOWN]
    ] + (
      [f"{len(self._bad)} tensors with values that are not finite"]
      if len(self._bad) > _SHOWN
      else []
    )
