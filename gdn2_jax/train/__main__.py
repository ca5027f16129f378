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

`python -m gdn2_jax.plan --config=...` prints the memory that a config needs.
"""

import os
import pathlib
import sys
from typing import Any, NoReturn

import jax
from absl import flags

from gdn2_jax import cli, config_flag
from gdn2_jax.data.tokenizer.api import load_tokenizer
from gdn2_jax.inference import Sampler, generate
from gdn2_jax.kernels import nvidia, self_check
from gdn2_jax.train.checkpoint.meta import SaveError
from gdn2_jax.train.config import (
  TrainConfig,
  describe_fields,
  preflight,
  validate,
)
from gdn2_jax.train.loop import train
from gdn2_jax.train.processes import join as distributed
from gdn2_jax.train.processes.place import find_place
from gdn2_jax.train.report.report import DivergedError
from gdn2_jax.train.report.writer import probe

_CONFIG = config_flag.define()
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory of the run; created, or resumed from."
)
_PROMPT = flags.DEFINE_string(
  "prompt", "Return the", "Prompt of the sample at the end of the run."
)
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed",
  False,
  "This is one of several processes of the run; JAX detects which one in a "
  "SLURM step or Open MPI job. Any of the next three flags implies this one.",
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator_address", None, "host:port of process 0."
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "Processes of the run."
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "Index of this process, from 0."
)
_INIT_TIMEOUT = flags.DEFINE_float(
  "init_timeout",
  300.0,
  "Seconds within which all processes must join.",
  lower_bound=1.0,
)
_HEARTBEAT_TIMEOUT = flags.DEFINE_float(
  "heartbeat_timeout",
  100.0,
  "Seconds of silence after which a process counts as lost.",
  lower_bound=1.0,
)
_SELF_CHECK = cli.define_self_check()

_OUT_OF_MEMORY = """
out of device memory. To need less, in this order:
  --config.model.remat=full      recompute activations in the backward pass
  --config.grad_accum={accum}        more, smaller microbatches; the same result
  --config.data.batch_size={batch}   fewer sequences per step; another result
  --config.mesh.fsdp=-1          spread parameters over all devices
`python -m gdn2_jax.plan --config=...` prints what a config needs.
"""

_NEXT = """
next:
  {python} -m gdn2_jax.generate --workdir={workdir} --prompt="..."
  {python} -m gdn2_jax.eval --workdir={workdir} --lengths=1,2,4,8
  {python} -m gdn2_jax.train --help
  tensorboard --logdir={workdir}/tensorboard    (pip install tensorboard)
  loss curve: {workdir}/loss.png"""


def _use_compilation_cache(workdir: pathlib.Path) -> None:
  cache = workdir / ".jax_cache"
  # It holds executables: no other user may write there.
  cache.mkdir(mode=0o700, parents=True, exist_ok=True)
  jax.config.update("jax_compilation_cache_dir", str(cache))
  # Over several devices a kernel is split by a callback. With its address in
  # the key every launch would compile again. Without it the key still changes
  # with our kernels, of which programs carry a digest; cuDNN's attention does
  # not change within a workdir.
  jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
  # By default programs that compile in under a second are compiled again.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _sample(
  config: TrainConfig, params: Any, workdir: pathlib.Path, prompt: str
) -> str:
  """The prompt and 64 sampled tokens."""
  tokenizer = load_tokenizer(workdir / "tokenizer.json")
  (tokens,) = generate(
    params,
    config.model,
    [tokenizer.encode(prompt)],
    64,
    rng=jax.random.key(config.seed),
    sampler=Sampler(
      temperature=0.8, top_p=0.95, vocab_size=tokenizer.vocab_size
    ),
    stop_ids=(tokenizer.eos_id,),
  )
  return prompt + tokenizer.decode(tokens)


def _train(config: TrainConfig, workdir: pathlib.Path) -> None:
  if hint := nvidia.install_hint():
    _say(f"running on the CPU; {hint}")
  result = train(config, workdir, say=_say)
  if result.stopped_by or jax.process_index() > 0:
    return
  # With several processes no single one holds the parameters to generate with.
  if jax.process_count() == 1:
    text = _sample(config, result.state.params, workdir, _PROMPT.value)
    _say(f"\nsample:\n{text}")
  _say(_NEXT.format(python=cli.python_command(), workdir=workdir))


def _say(line: str) -> None:
  print(line, flush=True)


def _join_processes() -> None:
  """Joins the other processes, if this is one of several."""
  given = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  if not _DISTRIBUTED.value and given == (None, None, None):
    return
  place = find_place(*given)
  distributed.join(
    place,
    init_timeout=_INIT_TIMEOUT.value,
    heartbeat_timeout=_HEARTBEAT_TIMEOUT.value,
  )
  if place.process_id == 0:
    _say(
      f"{place.num_processes} processes, {jax.device_count()} devices "
      f"(place from {place.found_by}, coordinator {place.coordinator})"
    )


def _explain_out_of_memory(config: TrainConfig, error: Exception) -> NoReturn:
  print(str(error)[:2000], file=sys.stderr)
  batch = config.data.batch_size
  accum = min(2 * config.grad_accum, batch)
  cli.fail(_OUT_OF_MEMORY.format(accum=accum, batch=max(batch // 2, 1)))


def main(argv: list[str]) -> None:
  """Entry point: checks the command line, trains, explains failures."""
  cli.refuse_positional(argv, "--config.num_steps=100")
  config = config_flag.read(_CONFIG)
  self_check.enable(_SELF_CHECK.value)
  if not _WORKDIR.value:
    cli.fail("--workdir is missing, e.g. --workdir=runs/tiny")
  workdir = pathlib.Path(os.path.expanduser(_WORKDIR.value))
  with (
    distributed.leaving_at_once(),
    cli.one_line_errors(DivergedError, SaveError),
  ):
    validate(config)
    _join_processes()
    preflight(config, jax.device_count(), jax.process_count())
    probe(workdir)
    if config.compilation_cache:
      _use_compilation_cache(workdir)
    try:
      _train(config, workdir)
    except jax.errors.JaxRuntimeError as e:
      if "RESOURCE_EXHAUSTED" not in str(e):
        raise
      _explain_out_of_memory(config, e)


def _help() -> str:
  fields = "\n".join(f"  {line}" for line in describe_fields(TrainConfig()))
  return f"{__doc__}\nConfig fields and their defaults:\n\n{fields}\n"


if __name__ == "__main__":
  cli.run(main, _help())
