"""Flags --workdir, --step and --model of programs, and the model they name."""

import pathlib
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh

from gdn2_jax.inference.identity import identify
from gdn2_jax.interop.folder import Model, load_model
from gdn2_jax.train.checkpoint import load_run

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a training run.")
_MODEL = flags.DEFINE_string(
  "model", None, "Folder of a published model, instead of --workdir."
)
_STEP = flags.DEFINE_integer(
  "step", None, "Step of the checkpoint to load; by default the newest."
)


def check_flags() -> None:
  """Raises ValueError unless the flags name one model."""
  if not _WORKDIR.value and not _MODEL.value:
    raise ValueError(
      "--workdir is missing, e.g. --workdir=runs/tiny; or --model, a folder "
      "with a published model"
    )
  if _WORKDIR.value and _MODEL.value:
    raise ValueError("--workdir and --model: expected one of them, got both")
  if _MODEL.value and _STEP.value is not None:
    raise ValueError(f"--step={_STEP.value}: only a --workdir has steps")


def open_model(mesh: Mesh | None = None) -> tuple[str, Model]:
  """The model that the flags name, and its name in reports.

  Args:
    mesh: devices to shard the parameters over; None puts them on the first.

  Raises:
    ValueError: the flags name none or two, or the folder is not a model with a
      tokenizer.
    OSError: no such directory.
  """
  step, model = _open(mesh)
  if step is None:
    return pathlib.Path(_MODEL.value).absolute().name, model
  return f"step {step}", model


def open_identified(mesh: Mesh | None = None) -> tuple[dict[str, Any], Model]:
  """The model that the flags name, and what identifies it in files of results.

  Args:
    mesh: as in `open_model`.

  Returns:
    JSON values: "name" (the folder), "step" (None for a published model), and
    the hashes "weights", "function" (of the config) and "tokenizer"; and the
    model.

  Raises:
    ValueError, OSError: as `open_model`.
  """
  step, model = _open(mesh)
  hashes = identify(model.params, model.config, model.tokenizer)
  origin = {
    "name": (_WORKDIR.value or _MODEL.value).rstrip("/"),
    "step": step,
    "weights": hashes.weights,
    "function": hashes.model,
    "tokenizer": hashes.tokenizer,
  }
  return origin, model


def _open(mesh: Mesh | None) -> tuple[int | None, Model]:
  """Step, None for a published model, and the model."""
  check_flags()
  if _MODEL.value:
    model = load_model(_MODEL.value, mesh=mesh)
    if model.tokenizer is None:
      raise ValueError(
        f"--model={_MODEL.value}: the folder has no tokenizer.json, so the "
        "model can neither read nor write text"
      )
    return None, model
  # Compiles into the cache that training made, if it made one. Set first: JAX
  # looks for a cache once, when it compiles its first program.
  cache = pathlib.Path(_WORKDIR.value) / ".jax_cache"
  if cache.is_dir():
    jax.config.update("jax_compilation_cache_dir", str(cache.absolute()))
  run = load_run(_WORKDIR.value, _STEP.value, mesh=mesh)
  return run.step, Model(run.config.model, run.params, run.tokenizer)
