r"""Trains a language model; relaunch the same command to resume.

  python -m gdn2_jax.train --config=configs/tiny_cpu.py --workdir=runs/tiny

A config file is Python with a get_config() that returns a TrainConfig. Any
field of it can be changed by a flag:

  python -m gdn2_jax.train --config=configs/tiny_cpu.py --workdir=runs/lr \
    --config.optimizer.lr=3e-3 --config.num_steps=500
  python -m gdn2_jax.train --config=configs/tiny_cpu.py --workdir=runs/two \
    --config.mesh.fsdp=-1 --config.grad_accum=2

SIGTERM or Ctrl-C finish the step, save, and exit with code 0. The workdir gets
config.json, versions.json, tokenizer.json, metrics.jsonl, tensorboard/,
checkpoints/, and at the end eval.json and loss.png.

Out of memory? `python -m gdn2_jax.plan --config=...` says what a config needs.
"""

import os
import pathlib
import sys
import traceback
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from gdn2_jax.data.tokenizer import load_tokenizer
from gdn2_jax.inference import Sampler, generate
from gdn2_jax.train.config import TrainConfig, describe_fields
from gdn2_jax.train.loop import train
from gdn2_jax.train.metrics import DivergedError

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file: Python with get_config() -> TrainConfig."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory of the run; made if missing, resumed if not."
)
_PROMPT = flags.DEFINE_string(
  "prompt", "Return the", "What the sample at the end of the run continues."
)
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed",
  False,
  "Join the processes of a cluster (jax.distributed.initialize) first.",
)

_OUT_OF_MEMORY = """
out of device memory. To need less, in this order:
  --config.model.remat=full      recompute activations in the backward pass
  --config.grad_accum={accum}        more, smaller microbatches; the same result
  --config.data.batch_size={batch}   fewer sequences per step; another result
  --config.mesh.fsdp=-1          spread parameters over all devices
`python -m gdn2_jax.plan --config=...` shows what a config needs.
"""


def _fail(message: str) -> None:
  print(f"error: {message}", file=sys.stderr, flush=True)
  sys.exit(1)


def _parse_flags(argv: list[str]) -> list[str]:
  """Flag errors as one line; ml_collections raises some as bare KeyError."""
  # Orbax tells the story of every file it writes at level INFO. Set before
  # parsing, so that --verbosity still has the last word.
  logging.set_verbosity(logging.WARNING)
  try:
    return app.parse_flags_with_usage(argv)
  except (KeyError, OSError, TypeError, ValueError) as e:
    _fail(str(e.args[0] if e.args else e))
    raise AssertionError from e


def _read_config() -> TrainConfig:
  config = _CONFIG.value
  if config is None:
    _fail("--config is missing, e.g. --config=configs/tiny_cpu.py; see --help")
  try:
    is_config = isinstance(config, TrainConfig)
    if not is_config:
      config.num_steps  # noqa: B018, tells why the file could not be read
  except OSError as e:
    _fail(f"--config: {e}")
  if not is_config:
    _fail(
      f"--config: get_config() returned {type(config).__name__}, expected "
      "TrainConfig"
    )
  return config


def _is_ours(error: ValueError) -> bool:
  """Whether our code refused something, rather than some library."""
  innermost = list(traceback.walk_tb(error.__traceback__))[-1][0]
  return innermost.f_globals.get("__name__", "").startswith("gdn2_jax.")


def _use_compilation_cache(workdir: pathlib.Path) -> None:
  cache = workdir / ".jax_cache"
  # It holds executables: nobody else may write there.
  cache.mkdir(mode=0o700, parents=True, exist_ok=True)
  jax.config.update("jax_compilation_cache_dir", str(cache))
  # By default programs that compile in under a second are compiled again.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _sample(
  config: TrainConfig, params: Any, workdir: pathlib.Path, prompt: str
) -> str:
  """The prompt and 64 tokens that the trained model adds to it."""
  tokenizer = load_tokenizer(workdir / "tokenizer.json")
  (tokens,) = generate(
    params,
    config.model,
    [tokenizer.encode(prompt)],
    64,
    rng=jax.random.key(config.seed),
    sampler=Sampler(temperature=0.8, top_p=0.95),
    stop_ids=(tokenizer.eos_id,),
  )
  return prompt + tokenizer.decode(tokens)


def _train(config: TrainConfig, workdir: pathlib.Path) -> None:
  result = train(config, workdir, say=_say)
  if result.stopped_by:
    return
  text = _sample(config, result.state.params, workdir, _PROMPT.value)
  if jax.process_index() == 0:
    _say(f"\nsample:\n{text}\n\nnext:")
    _say(
      f'  python -m gdn2_jax.generate --workdir={workdir} --prompt="..."\n'
      f"  python -m gdn2_jax.eval --workdir={workdir}\n"
      f"  tensorboard --logdir={workdir / 'tensorboard'}\n"
      f"  loss curve: {workdir / 'loss.png'}"
    )


def _say(line: str) -> None:
  print(line, flush=True)


def main(argv: list[str]) -> None:
  """Entry point: checks the command line, trains, explains failures."""
  if len(argv) > 1:
    raise app.UsageError(
      f"unexpected argument {argv[1]!r}; flags start with --, as in "
      "--config.num_steps=100"
    )
  config = _read_config()
  if not _WORKDIR.value:
    _fail("--workdir is missing, e.g. --workdir=runs/tiny")
  workdir = pathlib.Path(os.path.expanduser(_WORKDIR.value))
  if _DISTRIBUTED.value:
    jax.distributed.initialize()
  try:
    if config.compilation_cache:
      _use_compilation_cache(workdir)
    _train(config, workdir)
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    print(str(e)[:2000], file=sys.stderr)
    batch = config.data.batch_size
    _fail(
      _OUT_OF_MEMORY.format(
        accum=min(2 * config.grad_accum, batch), batch=max(batch // 2, 1)
      )
    )
  except DivergedError as e:
    _fail(str(e))
  except ValueError as e:
    if not _is_ours(e):
      raise
    _fail(str(e))


def run() -> None:
  """Parses flags and runs main; --help lists every config field."""
  fields = "\n".join(f"  {line}" for line in describe_fields(TrainConfig()))
  sys.modules["__main__"].__doc__ = (
    f"{__doc__}\nConfig fields and their defaults:\n{fields}\n"
  ).replace("%", "%%")
  app.run(main, flags_parser=_parse_flags)


if __name__ == "__main__":
  run()
