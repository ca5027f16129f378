r"""Publishes a trained model as one folder: config, weights, tokenizer, card.

  python -m gdn2_jax.export --workdir=runs/tiny_cpu --out=published/tiny
  python -m gdn2_jax.export --workdir=runs/tiny_cpu --step=500 --out=out/500
  python -m gdn2_jax.export --workdir=runs/tiny_cpu --out=published/tiny \
    --overwrite --license=apache-2.0 --description="Trained on ..." --program
  python -m gdn2_jax.export --model=published/tiny --out=published/half \
    --param_dtype=bfloat16
  python -m gdn2_jax.export --workdir=runs/tiny_cpu --out=published/tiny \
    --push=user/tiny

--push uploads the folder to the Hugging Face Hub (log in with `hf auth login`;
a new repository is private unless --public).

The model is a run's checkpoint (--workdir, the newest unless --step says which)
or another such folder (--model). With --program the folder also has prefill and
decode as programs for --platforms, which JAX runs without this library: its
run.py shows how. docs/weights.md describes the folder. Exit status: 0 done, 1
refused (the reason is on standard error).
"""

import dataclasses
import math
import pathlib

from absl import flags

from gdn2_jax import cli
from gdn2_jax.interop import (
  Card,
  Model,
  hub,
  load_model,
  param_specs,
  save_model,
)
from gdn2_jax.interop.export.program import (
  CHUNK_SIZE,
  PLATFORMS,
  check_request,
  export_programs,
)
from gdn2_jax.interop.folder import check_target
from gdn2_jax.interop.tree import cast_params
from gdn2_jax.train.checkpoint import load_run
from gdn2_jax.train.report.evaluation import card_facts

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a training run.")
_STEP = flags.DEFINE_integer(
  "step", None, "Step of the checkpoint; by default the newest."
)
_MODEL = flags.DEFINE_string(
  "model", None, "A published-model folder, instead of --workdir."
)
_OUT = flags.DEFINE_string("out", None, "Folder to write.")
_OVERWRITE = flags.DEFINE_bool(
  "overwrite", False, "Replace the model that is in --out."
)
_PARAM_DTYPE = flags.DEFINE_enum(
  "param_dtype",
  None,
  ["float32", "bfloat16", "float16"],
  "Rounds the parameters; by default they stay as they are. A_log and dt_bias "
  "are float32 always.",
)
_PROGRAM = flags.DEFINE_bool(
  "program", False, "Also export prefill and decode for JAX alone."
)
_PLATFORMS = flags.DEFINE_list(
  "platforms",
  ",".join(PLATFORMS),
  "Platforms of --program: cpu, cuda, rocm, tpu.",
)
_CHUNK_SIZE = flags.DEFINE_integer(
  "chunk_size",
  CHUNK_SIZE,
  "Tokens that a call of prefill takes, a power of two >= 16.",
)
_MAX_LENGTH = flags.DEFINE_integer(
  "max_length",
  None,
  "Tokens that a sequence of --program may have, for patterns with layers A.",
)
_NAME = flags.DEFINE_string("name", "", "Heading of the model card.")
_LICENSE = flags.DEFINE_string(
  "license", "", "License of the weights: apache-2.0, ..."
)
_PUSH = flags.DEFINE_string(
  "push", "", "Repository USER/NAME on the Hugging Face Hub to upload --out to."
)
_PUBLIC = flags.DEFINE_bool(
  "public", False, "Make a new repository of --push public."
)
_DESCRIPTION = flags.DEFINE_string("description", "", "Text of the model card.")


def main(argv: list[str]) -> None:
  """Entry point: checks the command line, loads, writes the folder."""
  cli.refuse_positional(argv, "--out=published/tiny")
  with cli.one_line_errors():
    _check_flags()
    model, facts = _load()
    if _PARAM_DTYPE.value:
      config = dataclasses.replace(model.config, param_dtype=_PARAM_DTYPE.value)
      params = cast_params(model.params, config)
      model = dataclasses.replace(model, config=config, params=params)
    save_model(
      _OUT.value,
      model.params,
      model.config,
      model.tokenizer,
      card=Card(
        name=_NAME.value,
        license=_LICENSE.value,
        description=_DESCRIPTION.value,
        facts=facts,
      ),
      extra=_programs(model),
      overwrite=_OVERWRITE.value,
    )
    _report(model)
    if _PUSH.value:
      print(hub.push(_OUT.value, _PUSH.value, private=not _PUBLIC.value))


def _check_flags() -> None:
  """Refuses bad flags before a model is read."""
  if bool(_WORKDIR.value) == bool(_MODEL.value):
    raise ValueError("expected one of --workdir=RUN and --model=FOLDER")
  if _MODEL.value and _STEP.value is not None:
    raise ValueError("--step picks a checkpoint of --workdir")
  if not _OUT.value:
    raise ValueError("--out is missing, e.g. --out=published/tiny")
  if _PUSH.value:
    hub.check_name(_PUSH.value)
  check_request(_CHUNK_SIZE.value, _PLATFORMS.value)
  check_target(_OUT.value, _OVERWRITE.value)


def _load() -> tuple[Model, dict[str, str]]:
  """The model, and facts about its training for the card."""
  if _MODEL.value:
    return load_model(_MODEL.value), {}
  run = load_run(_WORKDIR.value, _STEP.value)
  model = Model(run.config.model, run.params, run.tokenizer)
  data = run.config.data
  tokens = run.step * data.batch_size * data.seq_len
  origin = run.config.init_from
  return model, ({"started from": origin} if origin else {}) | {
    "training steps": f"{run.step:,}",
    "training tokens": f"{tokens:,} in rows of {data.seq_len:,}",
    "training data": data.source,
    **card_facts(_WORKDIR.value, run.step),
  }


def _programs(model: Model) -> dict[str, bytes]:
  if not _PROGRAM.value:
    return {}
  tokenizer = model.tokenizer
  return export_programs(
    model.config,
    chunk_size=_CHUNK_SIZE.value,
    platforms=_PLATFORMS.value,
    max_length=_MAX_LENGTH.value,
    eos_id=None if tokenizer is None else tokenizer.eos_id,
  )


def _report(model: Model) -> None:
  folder = pathlib.Path(_OUT.value)
  specs = param_specs(model.config).values()
  count = sum(math.prod(spec.shape) for spec in specs)
  print(f"{folder}: {count:,} parameters")
  for path in sorted(folder.iterdir()):
    print(f"  {path.stat().st_size:>14,}  {path.name}")
  python = cli.python_command()
  example = '--prompt="Return the"' if model.tokenizer else "--tokens=1,2,3"
  if model.tokenizer:
    print(f"{python} -m gdn2_jax.generate --model={folder} {example}")
  if _PROGRAM.value:
    print(f"{python} {folder}/run.py {example}")


if __name__ == "__main__":
  cli.run(main, __doc__)
